"""Your own Lightning project with one optimizer and one callback of ours, and nothing else.

Run: ``python recipes/your_own_lightning.py`` (seconds on a CPU). Replace `Bigram` and the random text by yours.
"""

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy

from lightning_opt.callbacks import Stability
from lightning_opt.optim import Lion


class Bigram(pl.LightningModule):
    """Predicts the next letter from the one before."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Embedding(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))

    def training_step(self, text, _):
        """Mean loss in nats per letter."""
        return cross_entropy(self.net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def configure_optimizers(self):
        """Lion as any torch optimizer."""
        return Lion(self.parameters(), lr=1e-3, weight_decay=0.1)


def main():
    """Trains for 300 steps and prints what the callback saw."""
    pl.seed_everything(1, verbose=False)
    text = (torch.randint(32, (2400, 1)) + 3 * torch.arange(33)) % 32  # each letter is three behind the next
    stability = Stability(window=50)
    trainer = pl.Trainer(max_steps=300, callbacks=[stability], logger=False, enable_checkpointing=False)
    trainer.fit(Bigram(), torch.utils.data.DataLoader(text, batch_size=8))
    print(f"loss {stability.losses[0]:.3f} -> {stability.losses[-1]:.3f}", stability.last)


if __name__ == "__main__":
    main()

"""What optimizers cannot see is fed to them, right, by a callback that works in somebody else's project."""

from __future__ import annotations

import logging
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_opt import optim
from lightning_opt.callbacks import EMA, OptimizerSignals, Stability
from lightning_opt.callbacks.curvature import Curvature
from lightning_opt.plan import ConfigError

VOCABULARY, WIDTH, LENGTH = 11, 8, 6


class Texts:
    """Token sequences that can be learnt."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Tensor:
        return (torch.arange(LENGTH + 1) + 3 * index) % VOCABULARY


class Language(pl.LightningModule):
    """Somebody's model: knows of us that `curvature_loss` is asked for, no more."""

    def __init__(self, make, **more):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCABULARY))
        self.make, self.more = make, more
        self.validated, self.losses, self.states = [], [], []

    def configure_optimizers(self):
        return self.make(self.parameters(), **self.more)

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def curvature_loss(self, batch, generator):
        logits = self.net(batch[:, :-1]).flatten(0, 1)
        labels = batch[:, 1:].flatten()
        if generator is not None:
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        return nn.functional.cross_entropy(logits, labels), torch.tensor(labels.numel())

    def validation_step(self, batch, _):
        self.validated.append([p.detach().clone() for p in self.parameters()])


class Bare(Language):
    curvature_loss = None


def fit(model, *callbacks, steps=20, every=None, accumulate=1, resume=None, path=None, log=1):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        val_check_interval=every,
        limit_val_batches=1 if every else 0,
        check_val_every_n_epoch=None if every else 1,
        num_sanity_val_steps=0,
        log_every_n_steps=log,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=path,
    )
    loader = DataLoader(Texts(), batch_size=8)
    trainer.fit(model, loader, loader if every else None, ckpt_path=resume, weights_only=False)
    return trainer


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- phases ---------------------------------------------------------------------------------------------------------

PHASES = {"a": {"rule": "lion", "until": 0.25, "lr_scale": 0.1}, "b": {"rule": "adamw"}}


def test_phases_are_told_the_length_of_the_run_and_tell_their_switches(caplog):
    model, signals, events = Language(optim.Phased, phases=PHASES, lr=1e-2, warm=0.1), OptimizerSignals(), []
    signals.on_event = lambda kind, **fields: events.append((kind, fields))
    with caplog.at_level(logging.INFO, logger="lightning_opt"):
        trainer = fit(model, signals, steps=40)
    told = {"step": 10, "before": "a", "after": "b", "rule": "adamw", "reason": "a ends there"}
    assert events == [("phase_switched", told)]
    lines = [record.message for record in caplog.records if record.message.startswith("phase")]
    assert lines[0] == "phases     a (lion) until step 10, then b (adamw)"
    assert lines[1] == "phase      a -> b (adamw) after step 10: a ends there"
    assert trainer.optimizers[0].phase == "b"


def test_phases_that_a_run_does_not_come_to_are_named(caplog):
    phases = {"a": {"rule": "lion", "until": 3}, "b": {"rule": "adamw", "until": 8}, "c": {"rule": "lion"}}
    model = Language(optim.Phased, phases=phases, lr=1e-2, warm=1)
    with caplog.at_level(logging.WARNING, logger="lightning_opt"):
        fit(model, OptimizerSignals(), steps=8)
    assert [record.message for record in caplog.records] == ["phases     c will not begin: this run ends after step 8"]


def test_dynamic_gets_the_volatility_that_is_logged(tmp_path):
    phases = {"calm": {"rule": "lion", "lr_scale": 0.1}, "rough": {"rule": "adamw"}}
    options = {"phases": phases, "lr": 1e-2, "threshold": 1e-6, "patience": 2, "dwell": 4}
    model, signals, stability, events = Language(optim.Dynamic, **options), OptimizerSignals(12), Stability(12), []
    signals.on_event = lambda kind, **fields: events.append(fields)
    fed, logged = [], []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            fed.append(trainer.optimizers[0]._read())
            logged.append(stability.last.get("loss_volatility"))

    fit(model, signals, stability, Look(), steps=24)
    assert fed[9:] == pytest.approx(logged[9:], rel=1e-6)
    assert all(value != value for value in fed[:9])  # not a number yet
    assert events[0]["step"] == 10 + 3
    assert events[0]["reason"].startswith("loss_volatility")


def test_the_change_of_the_gradient_norm_is_the_mean_over_the_window():
    phases = {"calm": {"rule": "adamw"}, "rough": {"rule": "lion"}}
    for limit in (None, 0.05):  # the optimizer's own norm while it clips, or one of ours
        model = Language(optim.Dynamic, phases=phases, signal="grad_norm_change", max_grad_norm=limit)
        norms = []

        class Norms(pl.Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer, norms=norms):
                norms.append(float(nn.utils.get_total_norm([p.grad for p in module.parameters()])))

        trainer = fit(model, OptimizerSignals(12), Norms(), steps=15)
        changes = [abs(b - a) / a for a, b in pairwise(norms)]
        assert trainer.optimizers[0]._read() == pytest.approx(sum(changes[-12:]) / 12, rel=1e-5)


def test_a_resumed_window_is_the_same(tmp_path):
    phases = {"calm": {"rule": "lion", "lr_scale": 0.1}, "rough": {"rule": "adamw"}}
    options = {"phases": phases, "lr": 1e-2, "threshold": 1e-6, "patience": 2, "dwell": 12}
    whole = Language(optim.Dynamic, **options)
    fit(whole, OptimizerSignals(12), steps=30)
    fit(Language(optim.Dynamic, **options), OptimizerSignals(12), steps=14).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["phases"]["count"] == 2

    class Later(Texts):
        def __getitem__(self, index):
            return super().__getitem__(index + 14 * 8)

    again, trainer = Language(optim.Dynamic, **options), None
    callbacks = OptimizerSignals(12)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=30, callbacks=[callbacks], logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(again, DataLoader(Later(), batch_size=8), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert trainer.optimizers[0].phase == "rough"
    assert again.losses == whole.losses[14:]
    assert same(weights(again), weights(whole))


# -- averaged weights -----------------------------------------------------------------------------------------------


def free(**more):
    return Language(optim.ScheduleFreeAdamW, lr=1e-2, betas=(0.9, 0.95), **more)


def test_validation_sees_the_average_and_training_never_notices(tmp_path):
    plain, watched = free(), free()
    fit(plain, OptimizerSignals(), steps=20)
    trainer = fit(watched, OptimizerSignals(), steps=20, every=5)
    assert watched.losses == plain.losses
    assert same(weights(watched), weights(plain)), "after the fit both hold the average"
    optimizer = trainer.optimizers[0]
    averages = weights(watched)
    assert same(watched.validated[-1], averages), "what was validated last is what is kept"
    assert optimizer.swapped
    with pytest.raises(RuntimeError, match=r"call the optimizer's train\(\)"):
        optimizer.step()
    optimizer.train()
    assert not same(weights(watched), averages)
    optimizer.eval()
    assert same(weights(watched), averages)


def test_checkpoints_hold_the_trained_weights_also_within_a_validation(tmp_path):
    class Save(pl.Callback):
        def on_validation_batch_start(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"within-{trainer.global_step}.ckpt")

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 5:
                self.trained = weights(module)

    save, model = Save(), free()
    fit(model, OptimizerSignals(), save, steps=20, every=5)
    saved = torch.load(tmp_path / "within-5.ckpt", weights_only=True)["state_dict"]
    assert same(list(saved.values()), save.trained)
    assert not same(model.validated[0], save.trained)
    over = free()  # a run that was over: nothing is trained, and the average is what it ends with
    fit(over, OptimizerSignals(), steps=5, resume=tmp_path / "within-5.ckpt")
    assert over.losses == []
    assert same(weights(over), model.validated[0])


def test_two_averages_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="callbacks = ema: must be left out"):
        fit(free(), OptimizerSignals(), EMA(0.9), path=tmp_path)


# -- curvature ------------------------------------------------------------------------------------------------------


def batches(count=1):
    texts = torch.stack([Texts()[index] for index in range(8 * count)])
    return list(texts.split(8))


def trained_a_little():
    model = Language(optim.Lion, lr=1e-2)
    fit(model, steps=6)
    return model.to(torch.float32)


@pytest.mark.parametrize("count", [1, 3])
def test_gauss_newton_bartlett_equals_the_sum_over_all_labels_on_average(count):
    """E over drawn labels of tokens u^2 = sum over tokens of E[g_token^2] / tokens, where labels are independent."""
    model = trained_a_little()
    params = list(model.parameters())
    before = [p.grad.clone() for p in params]
    expected = [torch.zeros_like(p) for p in params]
    tokens = torch.cat([batch[:, :-1].flatten() for batch in batches(count)])
    for token in tokens.unique():
        share = (tokens == token).float().mean()
        probabilities = model.net(token).softmax(-1).detach()
        for label in range(VOCABULARY):
            loss = -model.net(token).log_softmax(-1)[label]
            for total, grad in zip(expected, torch.autograd.grad(loss, params), strict=True):
                total += share * probabilities[label] * grad.square()
    draws = 300
    found = [torch.zeros_like(p) for p in params]
    for step in range(draws):
        curvature = Curvature(params, "gnb", step)
        for batch in batches(count):
            curvature.add(model, batch)
        for total, value in zip(found, curvature.estimate().values(), strict=True):
            total += value / draws
    for want, got in zip(expected, found, strict=True):
        assert float((got - want).norm() / want.norm()) < 0.15
        assert float(got.sum() / want.sum()) == pytest.approx(1, abs=0.05)
    assert same([p.grad for p in params], before), "the step's gradients are untouched"


@pytest.mark.parametrize("count", [1, 3])
def test_hutchinson_equals_a_product_by_double_backward(count):
    model = trained_a_little()
    params = list(model.parameters())
    before = weights(model)
    params[0].grad = torch.full_like(params[0], 3.0)
    curvature = Curvature(params, "hutchinson", 7)
    for batch in batches(count):
        curvature.add(model, batch)
    draws = curvature._normals()
    found = curvature.estimate()
    loss = sum(model.curvature_loss(batch, None)[0] for batch in batches(count)) / count
    grads = torch.autograd.grad(loss, params, create_graph=True)
    products = torch.autograd.grad(sum((g * draws[p]).sum() for g, p in zip(grads, params, strict=True)), params)
    for p, product in zip(params, products, strict=True):
        want = draws[p] * product
        assert float((found[p] - want).norm() / want.norm()) < 0.01
    assert same(weights(model), before), "the weights are back to the last bit"
    assert torch.equal(params[0].grad, torch.full_like(params[0], 3.0)), "the step's gradient is untouched"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_sophia_is_fed_every_interval(accumulate, estimator):
    model = Language(optim.Sophia, lr=1e-3, estimator=estimator, interval=4)
    moved, last = [], []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if len(last) < trainer.global_step:
                hessian = trainer.optimizers[0].state[next(model.parameters())]["hessian"].clone()
                moved.append(not last or not torch.equal(last[-1], hessian))
                last.append(hessian)

    fit(model, OptimizerSignals(), Look(), steps=10, accumulate=accumulate)
    assert moved == [k % 4 == 0 for k in range(10)]
    assert float(last[0].abs().sum()) > 0


def test_a_phase_of_sophia_is_fed_before_it_begins():
    phases = {"first": {"rule": "lion", "until": 12}, "then": {"rule": "sophia", "interval": 4}}
    model = Language(optim.Phased, phases=phases, lr=1e-3, warm=8)
    held = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            state = trainer.optimizers[0].state[next(model.parameters())]
            held.append(state["hessian"].clone() if "hessian" in state else None)

    fit(model, OptimizerSignals(), Look(), steps=18)
    assert [h is not None for h in held] == [k >= 4 for k in range(18)]
    changed = [k for k in range(5, 18) if not torch.equal(held[k], held[k - 1])]
    assert changed == [8, 12, 16]
    assert float(held[4].abs().sum()) > 0


def test_needs_are_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"must have curvature_loss\(batch, generator\)"):
        fit(Bare(optim.Sophia, lr=1e-3), OptimizerSignals())
    with pytest.raises(ConfigError, match="needs hessian_diagonal: add the callback OptimizerSignals"):
        fit(Language(optim.Sophia, lr=1e-3))
    model = Language(optim.Lion, lr=1e-3)
    model.configure_optimizers = lambda: Wanting(model.parameters(), lr=1e-3)
    with pytest.raises(ConfigError, match="optimizer = lion: needs the_moon, which nothing here feeds"):
        fit(model, OptimizerSignals())


class Wanting(optim.Lion):
    needs = frozenset({"the_moon"})


def test_it_costs_nothing_where_nothing_is_needed():
    signals, model = OptimizerSignals(), Language(optim.Lion, lr=1e-3)
    trainer = fit(model, signals, steps=3)
    assert signals._undo == []
    assert signals._count == 0
    assert trainer.optimizers[0]._before_update == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_groups_may_differ_in_interval_and_estimator(accumulate):
    """And weights under another rule, which an estimate's passes reach too, keep their gradients."""

    def make(params, **more):
        table, weight, bias = params
        groups = [{"params": [table], "interval": 2}, {"params": [weight], "interval": 3, "estimator": "hutchinson"}]
        return optim.Sophia([*groups, {"params": [bias], "rule": "sgd", "lr": 1.0}], **more)

    model = Language(make, lr=1e-9, weight_decay=0.0)
    start = model.net[2].bias.detach().clone()
    held, gradients = [], []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if len(held) < trainer.global_step:
                state = trainer.optimizers[0].state
                held.append([state[p]["hessian"].clone() for p in (model.net[0].weight, model.net[2].weight)])

        def on_before_optimizer_step(self, trainer, module, optimizer):
            gradients.append(module.net[2].bias.grad.clone())

    fit(model, OptimizerSignals(), Look(), steps=7, accumulate=accumulate)
    for k, interval in enumerate((2, 3)):
        changed = [t for t in range(1, 7) if not torch.equal(held[t][k], held[t - 1][k])]
        assert changed == list(range(interval, 7, interval))
    assert bool((held[0][0] >= 0).all())  # squares
    assert bool((held[0][1] < 0).any())
    plain, other = Language(optim.SGD, lr=0.0), []

    class Same(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            other.append(module.net[2].bias.grad.clone())
            module.net[2].bias.data.sub_(other[-1])

    fit(plain, Same(), steps=7, accumulate=accumulate)
    assert not torch.equal(model.net[2].bias, start)
    torch.testing.assert_close(torch.stack(gradients), torch.stack(other), rtol=1e-4, atol=1e-6)


def test_the_share_that_sophia_does_not_clip_is_logged_behind_every_estimate():
    signals, told, wanted = OptimizerSignals(), [], []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            share = trainer.callback_metrics.pop("sophia/unclipped", None)
            if share is not None:
                states = [trainer.optimizers[0].state[p] for p in model.parameters()]
                free = [s["exp_avg"].abs() < (s["hessian"] * 3.0).clamp(min=1e-15) for s in states]
                told.append((trainer.global_step, float(share)))
                wanted.append(float(torch.cat([part.flatten() for part in free]).float().mean()))

    model = Language(optim.Sophia, lr=1e-3, interval=4, gamma=3.0)
    trainer = fit(model, signals, Look(), steps=10)
    assert [step for step, _ in told] == [1, 5, 9]
    assert [share for _, share in told] == pytest.approx(wanted)
    assert all(0.02 < share < 1 for share in wanted)
    assert signals.columns(model) == []
    signals.optimizer = trainer.optimizers[0]
    assert signals.columns(model) == ["sophia/unclipped"]


@pytest.mark.parametrize(("every", "wanted"), [(3, [3, 6, 9]), (4, [4, 8]), (0, [])])
def test_the_share_waits_for_the_next_step_that_is_logged(every, wanted, monkeypatch):
    """Estimates in steps 1, 5 and 9; what nobody is told is not worked out."""
    told, asked, shares = [], [], iter((0.25, 0.5, 0.75))
    made = lambda optimizer: asked.append(optimizer) or torch.tensor(next(shares))  # noqa: E731
    monkeypatch.setattr("lightning_opt.optim.sophia.unclipped", made)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            share = trainer.callback_metrics.pop("sophia/unclipped", None)
            if share is not None:
                told.append((trainer.global_step, float(share)))

    fit(Language(optim.Sophia, lr=1e-3, interval=4), OptimizerSignals(), Look(), steps=10, log=every)
    assert told == list(zip(wanted, (0.25, 0.5, 0.75), strict=False))
    assert len(asked) == (3 if every else 0)


def test_the_share_that_waits_survives_a_stop(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_opt.optim.sophia.unclipped", lambda optimizer: torch.tensor(0.25))
    told, shown = tmp_path / "two.ckpt", []

    class Save(pl.Callback):
        def on_train_end(self, trainer, module):
            trainer.save_checkpoint(told)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            shown.append((trainer.global_step, trainer.callback_metrics.pop("sophia/unclipped", None)))

    fit(Language(optim.Sophia, lr=1e-3, interval=4), OptimizerSignals(), Save(), steps=2, log=3)
    fit(Language(optim.Sophia, lr=1e-3, interval=4), OptimizerSignals(), Look(), steps=4, log=3, resume=told)
    assert shown == [(3, torch.tensor(0.25)), (4, None)]

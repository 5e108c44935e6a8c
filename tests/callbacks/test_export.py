"""Export: what transformers loads again computes the same logits, and no failure looks like success."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign_project import Foreign, Rows, environment, fit
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_opt.callbacks import Export
from lightning_opt.callbacks.export import read_headers, verify


class Llama(pl.LightningModule):
    """Somebody's module around a Hugging Face model."""

    def __init__(self, tied: bool = True, compiled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            tie_word_embeddings=tied,
        )
        self.model = LlamaForCausalLM(config)
        if compiled:
            self.model = torch.compile(self.model, backend="eager")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<eos>": 0} | {f"w{i}": i for i in range(1, 16)}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


TOKENS = Rows(3).tokens


@pytest.mark.parametrize(("tied", "compiled"), [(True, False), (False, False), (True, True)])
def test_what_is_loaded_again_computes_the_same(tmp_path: Path, tied: bool, compiled: bool) -> None:
    module = Llama(tied, compiled)
    export = Export(tmp_path / "run" / "model", tokenizer())
    fit(tmp_path, module, [export], max_steps=3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    with torch.no_grad():
        expected = module.model.eval()(input_ids=TOKENS).logits
        assert torch.equal(again(input_ids=TOKENS).logits, expected)
    words = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert words.eos_token == "<eos>"
    generation = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0
    assert not any("_orig_mod" in name for name in read_headers(tmp_path / "run" / "model"))
    assert ("lm_head.weight" in read_headers(tmp_path / "run" / "model")) is not tied
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


def test_another_dtype_leaves_the_model_in_memory_alone(tmp_path: Path) -> None:
    module = Llama()
    fit(tmp_path, module, [Export(tmp_path / "model", dtype="bfloat16")], max_steps=2)
    assert module.model.dtype == torch.float32
    assert {dtype for dtype, _ in read_headers(tmp_path / "model").values()} == {"BF16"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, module.model.lm_head.weight.to(torch.bfloat16))


def test_an_older_export_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale.safetensors").write_bytes(b"old")
    export = Export()
    export.directory = target  # as a job injects it
    fit(tmp_path, Llama(), [export], max_steps=1)
    assert not (target / "stale.safetensors").exists()
    assert (target / "model.safetensors").stat().st_mode & 0o777 == (target / "config.json").stat().st_mode & 0o777
    assert sorted(path.name for path in tmp_path.iterdir() if "model" in path.name) == ["model"]


def test_without_a_directory_it_goes_beside_the_trainers_files(tmp_path: Path) -> None:
    fit(tmp_path, Llama(), [Export()], max_steps=1)
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_failed_save_raises_and_leaves_the_older_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "kept").write_text("older")
    monkeypatch.setattr(
        LlamaForCausalLM, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(RuntimeError, match=r"export to .*model failed: OSError: disk full"):
        fit(tmp_path, Llama(), [Export(target)], max_steps=1)
    assert [path.name for path in target.iterdir()] == ["kept"]
    assert not list(tmp_path.glob(".model*"))


def test_a_file_in_the_folders_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError):
        Export().save(Llama().model, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_a_save_that_silently_writes_nothing_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", nothing)
    with pytest.raises(RuntimeError, match=r"holds no \.safetensors file"):
        fit(tmp_path, Llama(), [Export(tmp_path / "model")], max_steps=1)
    assert not (tmp_path / "model").exists()


def damage(folder: Path, how: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = "model.layers.0.input_layernorm.weight"
    if how == "truncated":
        path.write_bytes(data[:-4])
        return
    if how == "missing":
        del header[name]
    elif how == "shape":
        header[name]["shape"] = [4, 4]
    elif how == "dtype":
        header[name]["dtype"] = "F64"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "its header promises"),
        ("missing", r"lacks model\.layers\.0\.input_layernorm\.weight"),
        ("shape", r"input_layernorm\.weight has shape \(4, 4\), expected \(16,\)"),
        ("dtype", r"input_layernorm\.weight is F64, expected F32"),
    ],
)
def test_what_was_written_is_compared_with_the_model(tmp_path: Path, how: str, message: str) -> None:
    model = Llama().model
    model.save_pretrained(tmp_path / "model")
    verify(tmp_path / "model", model.state_dict())
    damage(tmp_path / "model", how)
    with pytest.raises(OSError, match=message):
        verify(tmp_path / "model", model.state_dict())


def test_a_mixture_of_experts_under_its_family_s_own_names(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    Export().save(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_a_model_that_cannot_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    module = Foreign()
    with pytest.raises(TypeError, match="neither Foreign nor its attribute `model` has save_pretrained"):
        fit(tmp_path, module, [Export(tmp_path / "model")])
    assert module.micro_losses == []


def test_refuses_an_unknown_dtype() -> None:
    with pytest.raises(ValueError, match=r"export\.dtype = int8"):
        Export(dtype="int8")


def test_it_draws_no_bar_into_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Export().save(Llama().model, tmp_path / "model")
    out, err = capfd.readouterr()
    assert "\r" not in out + err


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from foreign_project import fit
from test_export import Llama
from lightning_opt.callbacks import Export

if __name__ == "__main__":
    target = Path(sys.argv[2]) / "model"
    try:
        fit(Path(sys.argv[2]), Llama(), [Export(target)], max_steps=2, devices=2, strategy="ddp")
        print("DONE", flush=True)
    except RuntimeError as error:
        print("RAISED", error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [False, True])
def test_over_two_processes_rank_zero_writes_and_all_learn_of_a_failure(tmp_path: Path, blocked: bool) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    target = tmp_path / "out"
    target.mkdir()
    if blocked:
        (target / "model").write_text("a file stands where the folder should go")
    command = [sys.executable, str(script), str(Path(__file__).parent), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert done.stdout.count("RAISED" if blocked else "DONE") == 2, done.stdout + done.stderr[-3000:]
    assert (target / "model").is_dir() is not blocked

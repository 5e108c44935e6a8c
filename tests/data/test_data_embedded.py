"""The corpora made on this machine: the same every time, no document twice, mathematics that is right."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import sympy

from lightning_opt.data import algebra_problems, embedded, mathematics

SMALL = "from lightning_opt.data import embedded; embedded.CORPUS_BYTES = 700_000; embedded.SYMBOLIC_PROBLEMS = 30;"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "CORPUS_BYTES", 700_000)
        patch.setattr(embedded, "SYMBOLIC_PROBLEMS", 30)
        embedded.make_corpora(folder, 0.04)
    return folder


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_three_corpora_of_one_size_without_a_document_twice(corpora: Path) -> None:
    assert sorted(path.name for path in corpora.iterdir()) == [
        f"{name}_{split}.jsonl" for name in ("code", "math", "prose") for split in ("train", "val")
    ]
    for name in ("code", "math", "prose"):
        train, val = texts(corpora / f"{name}_train.jsonl"), texts(corpora / f"{name}_val.jsonl")
        assert len(set(train + val)) == len(train) + len(val)
        sizes = [sum(len(text.encode()) for text in part) for part in (train, val)]
        assert 700_000 <= sum(sizes) < 760_000
        assert 0.03 < sizes[1] / sum(sizes) < 0.12
        assert min(map(len, train)) > 20


def test_made_again_in_another_process_it_is_the_same(corpora: Path, tmp_path: Path) -> None:
    script = f"{SMALL} import sys, pathlib; embedded.make_corpora(pathlib.Path(sys.argv[1]), 0.04);"
    script += (
        "assert not {'torch', 'numpy.random', 'matplotlib', 'transformers'} & set(sys.modules)"  # read, not imported
    )
    environment = {**os.environ, "PYTHONHASHSEED": "99", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    for path in corpora.iterdir():
        other = tmp_path / path.name
        assert hashlib.sha256(other.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest(), path.name


def test_code_is_python_and_not_repeated_in_the_prose(corpora: Path) -> None:
    for text in texts(corpora / "code_val.jsonl"):
        compile(text, "held out", "exec", dont_inherit=True)
    prose = "\n".join(texts(corpora / "prose_train.jsonl"))
    for text in texts(corpora / "code_val.jsonl"):
        for docstring in re.findall(r'"""(.{300,}?)"""', text, flags=re.DOTALL)[:5]:
            assert docstring.strip()[:250] not in prose


def evaluate(text: str) -> Fraction:
    assert re.fullmatch(r"[-\d\s+*/().]+", text)
    return sympy.Rational(sympy.sympify(text, rational=True))


def test_every_chain_of_equal_signs_is_true() -> None:
    """All plain arithmetic lines, by sympy: a corpus that teaches wrong sums would be worse than none."""
    checked = 0
    number = r"[-\d(][-\d\s+*/()]*"
    for maker, _ in mathematics.PLAIN:
        for seed in range(40):
            for line in maker(random.Random(seed)).splitlines():
                if "in base" in line or not re.fullmatch(rf"{number}( = {number})+", line.strip()):
                    continue
                values = {evaluate(side) for side in line.split(" = ")}
                assert len(values) == 1, f"{maker.__name__}: {line}"
                checked += 1
    assert checked > 1000


@pytest.mark.parametrize("seed", range(25))
def test_answers_of_worded_problems(seed: int) -> None:
    r = random.Random
    text = mathematics._quadratic(r(seed))
    b, c = map(int, re.search(r"\+ \((-?\d+)\)x \+ \((-?\d+)\) = 0", text).groups())  # type: ignore[union-attr]
    x = sympy.Symbol("x")
    roots = {int(root) for root in sympy.solve(x**2 + b * x + c, x)}
    assert {int(value) for value in re.findall(r"x = (-?\d+)", text.splitlines()[-1])} == roots
    text = mathematics._system(r(seed))
    a, e, d, f = map(int, re.search(r"(\d+)x \+ y = (-?\d+)\n  (\d+)x - y = (-?\d+)", text).groups())  # type: ignore[union-attr]
    px, py = map(int, re.search(r"\((-?\d+), (-?\d+)\)\.$", text).groups())  # type: ignore[union-attr]
    assert (a * px + py, d * px - py) == (e, f)
    n, base, digits = re.search(
        r"Write (\d+) in base (\d+).*: (\d+) in base", mathematics._base_conversion(r(seed)), re.S
    ).groups()  # type: ignore[union-attr]
    assert int(digits, int(base)) == int(n)
    n, product = re.search(
        r"^Write (\d+) .*?(?:= ([\d *]+)|(?<=is prime)\.)$", mathematics._prime_factors(r(seed)), re.S
    ).groups()  # type: ignore[union-attr]
    factors = [int(p) for p in product.split(" * ")] if product else [int(n)]
    assert all(sympy.isprime(p) for p in factors)
    assert sympy.prod(factors) == int(n)


@pytest.mark.parametrize("maker", algebra_problems._MAKERS)
def test_algebra_is_right(maker: object) -> None:
    x = sympy.Symbol("x")
    for seed in range(5):
        text = maker(random.Random(seed))  # type: ignore[operator]
        last = text.splitlines()[-1].replace("^", "**")
        if maker is algebra_problems._integral_of_polynomial:
            f, low, high = re.search(r"f\(x\) = (.*) from (-?\d+) to (-?\d+)", text).groups()  # type: ignore[union-attr]
            value = sympy.integrate(sympy.sympify(f.replace("^", "**")), (x, int(low), int(high)))
            assert sympy.sympify(last.split(" = ")[1].rstrip(".")) == value
        elif maker in (algebra_problems._product_rule, algebra_problems._chain_rule):
            f = sympy.sympify(re.search(r"f\(x\) = (.*)\.\n", text)[1].replace("^", "**"))  # type: ignore[index]
            assert sympy.simplify(sympy.sympify(last.split(" = ")[-1]) - sympy.diff(f, x)) == 0
        elif maker in (algebra_problems._factorisation,):
            left, right = last.split(" = ")
            assert sympy.expand(sympy.sympify(left) - sympy.sympify(right)) == 0


def test_multiple_choice_points_at_the_right_letter() -> None:
    for seed in range(50):
        text = mathematics._choice(random.Random(seed))
        question, answer = re.search(r"What is (.*)\?", text)[1], text[-1]  # type: ignore[index]
        options = dict(re.findall(r"^([A-D])\. (-?\d+)$", text, flags=re.M))
        assert len(set(options.values())) == 4
        assert int(options[answer]) == evaluate(question)


def test_identity_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    first = embedded.identity()
    monkeypatch.setattr(embedded, "_version", lambda _: "0.0")
    assert embedded.identity() != first


@pytest.mark.slow
def test_the_whole_default_repeats_nothing(tmp_path: Path) -> None:
    from lightning_opt import data

    config = {
        "name": "embedded", "source": "embedded", "path": None, "weights": None, "sequence_length": 256,
        "tokenizer": {"path": None, "vocab_size": 2048}, "val_fraction": 0.04, "cache_dir": str(tmp_path),
    }  # fmt: skip
    built = data.build(config, seed=1)
    assert all(epochs < 1 for epochs in built.epochs(1_638_400).values())  # the default run repeats nothing
    assert all(info.val_tokens > 20_000 for info in built.corpora)

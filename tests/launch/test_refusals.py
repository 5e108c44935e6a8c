"""Wrong commands: exit code 2, one line that names the closest right thing, fast, and before torch is imported."""

import json
import os
import socket
import subprocess
import sys

import pytest

# arguments, what the line starts with, what it must also say
NAMED = [
    (["optimizer=lionn"], "optimizer = lionn: ", "did you mean lion?"),
    (["data=files", "data.path=no_such_folder"], "data.path = no_such_folder: ", "not found"),
    (["trainer.global_batch_size=10", "trainer.micro_batch_size=4"], "trainer.global_batch_size = 10: ", "8 or 12"),
]

MORE = [
    (["optimzer=lion"], "optimzer = lion: ", "did you mean optimizer?"),
    (["lrr=3"], "lrr = 3: ", "did you mean optimizer.lr?"),
    (["+lrr=3"], "+lrr = 3: ", "did you mean optimizer.lr?"),
    (["optimizer.lr=abc"], "optimizer.lr = abc: ", "must be a number > 0"),
    (["optimizer.lr=-1"], "optimizer.lr = -1: ", "must be a number > 0"),
    (["optimizer.lr=nan"], "optimizer.lr = nan: ", "must be a number > 0"),
    (["optimizer.betas=[0.9]"], "optimizer.betas = [0.9]: ", "must be a list of 2 numbers"),
    (["optimizer.weight_decay=-0.1"], "optimizer.weight_decay = -0.1: ", ">= 0"),
    (["trainer.precision=fp17"], "trainer.precision = fp17: ", "auto, 32-true, bf16-mixed, bf16-true"),
    (["model=llama_131m"], "model = llama_131m: ", "did you mean llama_130m?"),
    (["schedule.warmup=5000"], "schedule.warmup = 5000: ", "run of 800 steps"),
    (["model=nanno"], "model = nanno: ", "did you mean nano?"),
    (["trainer.devices=3"], "trainer.global_batch_size = 8: ", "multiple of devices"),
    (["trainer.strategy=ddpp"], "trainer.strategy = ddpp: ", "auto, ddp"),
    (["model=hf", "model.path=org/name", "model.z_los=1e-4"], "model.z_los = 0.0001: ", "did you mean model.z_loss?"),
    (["model=hf", "model.path=./none"], "model.path = ./none: ", "not found"),
    (["data.weights={prose: 1}"], "data.weights = ", "must name code, math too"),
    (["schedule=wsd", "schedule.decay=0"], "schedule.decay = 0: ", "> 0"),
    (["scale=1x", "scale.tokens=1e6"], "scale.tokens = 1000000: ", "scale.chinchilla = 1.0"),
    (["scale.tokens=1e6", "trainer.max_steps=7"], "scale.tokens = 1000000: ", "trainer.max_steps=null"),
    (["debug=smoke", "trainer.max_tokens=1e5"], "trainer.max_tokens = 100000: ", "trainer.max_steps=null"),
    (["experiment=study_schedule", "trainer.max_steps=100"], "trainer.max_steps = 100: ", "scale=demo"),
    (["optimizer.name=lion"], "optimizer.name = lion: ", "choose by optimizer=NAME"),
    (["schedule={name: wsd}"], "schedule.name = wsd: ", "choose by schedule=NAME"),
    (["model.name=mine"], "model.name = mine: ", "choose by model=NAME"),
    (["hydra.mode=MULTIRUN", "seed=1"], "hydra.mode = MULTIRUN: ", "use -m"),
    (["~optimizer"], "~optimizer = null: ", "~tuned"),
    (["optimizer.roles.matrx.lr_scale=2"], "optimizer.roles.matrx", "did you mean matrix?"),
    (["optimizer.roles.default.rule=lionn"], "optimizer.roles.default.rule = lionn: ", "did you mean lion?"),
    (["optimizer=soap", "optimizer.state_dtype=int8"], "optimizer.state_dtype = int8: ", "soap has float32"),
    (["-m", "optimizer=adamw,soap", "optimizer.state_dtype=int8"], "optimizer.state_dtype = int8: ", "soap has"),
    (["-m", "optimizer=adamw,schedule_free_adamw", "schedule=cosine"], "schedule = cosine: ", "schedule=flat"),
    (["optimizer=phased", "optimizer.phases.end.until=0.9"], "optimizer.phases.end.until = 0.9: ", "must be null"),
    (["optimizer=phased", "optimizer.phases.middle.until=0.2"], "optimizer.phases.middle.until = 0.2: ", "later"),
    (["optimizer=phased", "+optimizer.phases.late={rul: lion}"], "optimizer.phases.late = ", "did you mean rule"),
    (["-m", "optimizer=adamw,dynamic", "~callbacks.signals"], "optimizer = dynamic: ", "needs loss_volatility"),
    (["+optimizer.foo=1"], "+optimizer.foo = 1: ", "optimizer has no field foo"),
    (["optimizer={lrr: 1}"], "optimizer.lrr = 1: ", "did you mean optimizer.lr?"),
    (["hydra.runn=3"], "hydra.runn = 3: ", "did you mean hydra.run?"),
    (["hydra/launcher=basik"], "hydra/launcher = basik: ", "did you mean basic?"),
    (["optimizer.lr=[1,2"], "optimizer.lr = [1,2: ", "cannot be read"),
    (["optimizer=adamw,lion"], "optimizer = adamw,lion: ", "train.py -m optimizer=adamw,lion"),
    (["experiment=study_schedul"], "experiment = study_schedul: ", "did you mean study_schedule?"),
    (
        ["callbacks.foo._target_=lightning_opt.callbacks.Throughputt"],
        "callbacks.foo._target_ = ",
        "did you mean Throughput?",
    ),
    (["callbacks=none", "callbacks.checkpoint.every_n_steps=4"], "callbacks.checkpoint = ", "no _target_"),
    (["callbacks.checkpoint.keep_last=0"], "callbacks.checkpoint.keep_last = 0: ", ">= 1"),
    (["callbacks.checkpoint.every_n_steps=often"], "callbacks.checkpoint.every_n_steps = often: ", ">= 0"),
    (["callbacks.loss_guard.sigma=-1"], "callbacks.loss_guard.sigma = -1: ", "> 0"),
    (["callbacks.loss_guard.on_spike=typo"], "callbacks.loss_guard.on_spike = typo: ", "skip, rewind"),
    (["callbacks.loss_guard.warmup=129"], "callbacks.loss_guard.warmup = 129: ", "the window, 128"),
    (["callbacks=ema", "callbacks.ema.decay=1"], "callbacks.ema.decay = 1: ", "< 1"),
    (["callbacks.foo._target_=nowhere.at_all.X"], "callbacks.foo._target_ = ", "nowhere is not installed"),
    (["callbacks.foo._target_=lightning.pytorch.callbacks.NoSuch"], "callbacks.foo._target_ = ", "has no NoSuch"),
    (["-m", "optimizer=adamw,lionn"], "optimizer = lionn: ", "did you mean lion?"),
    (["-m", "optimizer=adamw,lion", "optimizer.lr=1e-3,1e-2,-1"], "optimizer.lr = -1: ", "> 0"),
    (["-m", "seed=1,2,1"], "sweep = seed=1: ", "same configuration as job 0"),
    (["-m", "optimizer.lr=interval(1,2)"], "optimizer.lr = interval(1,2): ", "choice"),
    (["-m", "hydra.run.dir=x", "seed=1,2"], "hydra.run.dir = x: ", "hydra.sweep.dir"),
    (["-m", "hydra.sweep.subdir=x", "seed=1,2"], "hydra.sweep.subdir = x: ", "hydra.sweep.dir=FOLDER"),
    (["-m", "seed=1,2", "on_failure=retry:0"], "on_failure = retry:0: ", "continue, stop or retry:N"),
    (["on_failure=sometimes"], "on_failure = sometimes: ", "continue, stop or retry:N"),
    (["-m", "seed=1,2", "jobs_per_device=0"], "jobs_per_device = 0: ", ">= 1"),
    (["-m", "seed=1,2", "hydra/launcher=job"], "hydra/launcher = job: ", "did you mean joblib?"),
    (["-m", "seed=1,2", "hydra/sweeper=basic"], "hydra/sweeper = basic: ", "grid, the default"),
    (["--cfg", "job", "-m", "seed=1,2"], "--cfg = job: ", "leave out -m"),
    (["tuned=null"], "tuned = null: ", "~tuned"),
    (["trainer.max_steps=5", "scale=1x"], "trainer.max_steps = 5: ", "scale=1x"),
    (["max_steps=5"], "max_steps = 5: ", "did you mean trainer.max_steps?"),
    (["seed=${oc.env:NO_SUCH_VARIABLE}"], "seed = ", "NO_SUCH_VARIABLE"),
    (["evaluation.suite=maxi"], "evaluation.suite = maxi: ", "mini"),
    (
        ["callbacks.sample_scores.every_n_steps=9", "callbacks.sample_scores.scorer.tasks=[mmmlu]"],
        "callbacks.sample_scores.scorer.tasks = mmmlu: ",
        "did you mean mmlu?",
    ),
    (["--no-such-flag"], "command line = ", "--help"),
    (["--cfg", "job", "optimizer=lionn"], "optimizer = lionn: ", "did you mean lion?"),
]

# All of `MORE` in one process, through the same `main`; imports are paid once.
_BATCH = """
import contextlib, io, json, sys
from lightning_opt.launch import main
sys.argv = ["train.py"]
answers = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    answers.append([code, out.getvalue(), err.getvalue(), "torch" in sys.modules])
print(json.dumps(answers))
"""


def assert_refused(code, out, err, start, words):
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith(start)
    assert words in err
    assert not out


@pytest.mark.parametrize(("arguments", "start", "words"), NAMED, ids=[" ".join(case[0]) for case in NAMED])
def test_refused_by_train_py(train_py, tmp_path, arguments, start, words):
    done = train_py(*arguments)
    assert_refused(done.code, done.out.replace("heavy: []\n", ""), done.err, start, words)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_below_torchrun_is_refused_once_on_each_machine(jobs, capsys, monkeypatch):
    from lightning_opt.launch import main

    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):  # two machines
        places = {"TORCHELASTIC_RUN_ID": "x", "RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4}
        for name, value in places.items():
            monkeypatch.setenv(name, str(value))
        assert main(["-m", "seed=1,2", "evaluation=none"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("-m = torchrun: a sweep starts its jobs itself")
    assert second == f"{socket.gethostname()}: {first}"
    assert not jobs


def test_a_machine_that_lacks_the_data_says_so(jobs, capsys, monkeypatch, tmp_path):
    from lightning_opt.launch import main

    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    across = ["trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2"]
    assert main([*across, "data=files", f"data.path={tmp_path}/none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{socket.gethostname()}: data.path = {tmp_path}/none: ")
    assert not jobs


@pytest.fixture(scope="module")
def answers(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", _BATCH],
        input=json.dumps([case[0] for case in MORE]),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert list(folder.iterdir()) == []
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(MORE)), ids=[" ".join(case[0]) for case in MORE])
def test_refused(answers, number):
    code, out, err, torch = answers[number]
    assert_refused(code, out, err, *MORE[number][1:])
    assert not torch

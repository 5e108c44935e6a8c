"""The launchers beside ours: what they cannot do is said before anything starts."""

import pytest

from lightning_opt.launch import launchers, main
from lightning_opt.plan import ConfigError


@pytest.mark.parametrize("name", ["joblib", "submitit_local", "submitit_slurm"])
def test_a_package_that_is_missing_is_named_in_one_line(jobs, capsys, monkeypatch, name):
    monkeypatch.setattr(launchers, "find_spec", lambda package: None)
    assert main(["-m", "seed=1,2", f"hydra/launcher={name}", "evaluation=none"]) == 2
    how = "pip install -c constraints.txt -e '.[run,launchers]'"
    assert capsys.readouterr().err == f"hydra/launcher = {name}: needs a package more: {how}\n"
    assert not jobs


@pytest.mark.parametrize(
    ("name", "asked", "refused"),
    [
        ("joblib", {}, None),
        ("joblib", {"jobs_per_device": 2}, None),
        ("joblib", {"on_failure": "stop"}, "on_failure"),
        ("submitit_slurm", {"on_failure": "retry:1"}, "on_failure"),
        ("submitit_local", {"jobs_per_device": 2}, "jobs_per_device"),
        ("basic", {"on_failure": "stop"}, "on_failure"),
        ("processes", {"on_failure": "retry:1", "jobs_per_device": 2}, None),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(monkeypatch, name, asked, refused):
    from omegaconf import OmegaConf

    monkeypatch.setattr(launchers, "find_spec", lambda package: package)
    hydra = OmegaConf.create({"runtime": {"choices": {"hydra/launcher": name}}, "launcher": {"_target_": "a.b.C"}})
    config = {"on_failure": "continue", "jobs_per_device": 1, **asked}
    if refused is None:
        launchers.check_launcher(hydra, config)
    else:
        with pytest.raises(ConfigError, match=f"^{refused} = .*hydra/launcher={name} "):
            launchers.check_launcher(hydra, config)

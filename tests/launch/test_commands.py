"""Right commands: what reaches the job, what is written, what comes back."""

import json
import os

import pytest
import yaml

from lightning_opt.launch import main
from lightning_opt.run_folder import config_hash

OFF = ["evaluation=none"]
SWEEP = ["-m", "hydra/launcher=basic"]  # in this process, where the jobs are counted


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_plain(node):
    assert type(node) in {dict, list, str, int, float, bool, type(None)}, type(node)
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        assert_plain(item)


def test_a_job_gets_plain_types_only(jobs):
    assert main(["optimizer=lion", *OFF]) == 0
    (job,) = jobs
    assert_plain(job["config"])
    assert job["config"]["optimizer"]["name"] == "lion"
    assert "hydra" not in job["config"]
    assert job["overrides"] == ["optimizer=lion", "evaluation=none"]


def test_hydra_writes_nothing(jobs, tmp_path):
    main(OFF)
    main([*SWEEP, "seed=1,2", *OFF])
    assert len(jobs) == 3
    ours = {"status.json", ".claim", "run.log", "sweep.json"}
    assert {path.rpartition("/")[2] for path in files(tmp_path)} <= ours, files(tmp_path)
    assert os.listdir(tmp_path) == ["runs"]


def test_the_hash_of_a_configuration_is_stable(jobs):
    main(["seed=3", *OFF])
    main(["evaluation=none", "seed=3"])
    main(["seed=4", *OFF])
    same, again, other = (config_hash(job["config"]) for job in jobs)
    assert same == again != other
    assert same == config_hash(json.loads(json.dumps(jobs[0]["config"])))
    assert same in jobs[0]["folder"].path.name


def test_the_saved_configuration_reads_back_as_the_job_had_it(jobs):
    main(["optimizer.lr=3e-4", *OFF])
    assert yaml.safe_load(jobs[0]["saved_config"]) == jobs[0]["config"]


@pytest.mark.parametrize("code", [2, 3])
def test_exit_codes_pass_through(jobs, code):
    assert main([f"seed={500 + code}", *OFF]) == code


@pytest.mark.parametrize("code", [143])
def test_a_stopped_job_stops_its_sweep(jobs, code):
    assert main([*SWEEP, f"seed=1,{500 + code},2", *OFF]) == code
    assert [job["config"]["seed"] for job in jobs] == [1, 500 + code]


@pytest.mark.parametrize(("seeds", "code"), [("503,1", 3), ("503,599,1", 1)])
def test_a_sweep_goes_on_after_a_failure_and_says_so(jobs, seeds, code, capsys):
    assert main([*SWEEP, f"seed={seeds}", *OFF]) == code
    assert [job["config"]["seed"] for job in jobs] == [int(seed) for seed in seeds.split(",")]
    assert ("a job that breaks" in capsys.readouterr().err) == ("599" in seeds)


def test_a_sweep_makes_every_combination(jobs):
    assert main([*SWEEP, "optimizer=adamw,lion", "optimizer.lr_scale=0.5,2", *OFF]) == 0
    made = [(job["config"]["optimizer"]["name"], job["config"]["optimizer"]["lr_scale"]) for job in jobs]
    assert made == [(name, scale) for name in ("adamw", "lion") for scale in (0.5, 2)]
    assert len({job["folder"].path for job in jobs}) == 4


def test_glob_and_range_sweeps(jobs):
    assert main([*SWEEP, "schedule=glob(co*)", "seed=range(1,3)", *OFF]) == 0
    made = [(job["config"]["schedule"]["name"], job["config"]["seed"]) for job in jobs]
    assert made == [(name, seed) for name in ("constant", "cosine") for seed in (1, 2)]


def test_the_user_names_the_folder(jobs, tmp_path):
    assert main(["hydra.run.dir=here/my_run", *OFF]) == 0
    assert jobs[0]["folder"].path.resolve() == tmp_path / "here" / "my_run"
    assert os.listdir(tmp_path) == ["here"]


def test_the_folder_may_use_hydras_own_words(jobs):
    assert main(["hydra.run.dir=out/${optimizer.name}_${now:%Y}", *OFF]) == 0
    assert jobs[0]["folder"].path.name.startswith("adamw_20")


def test_a_sweeps_folder(jobs, tmp_path):
    assert main([*SWEEP, "hydra.sweep.dir=mine", "seed=1,2", *OFF]) == 0
    assert {job["folder"].path.parts[0] for job in jobs} == {"mine"}
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("named", ["taken", "taken/file.txt", "/proc/none"])
def test_a_sweep_folder_that_cannot_be_used_is_refused_in_one_line(jobs, tmp_path, capsys, named):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file.txt").write_text("mine")
    assert main([*SWEEP, f"hydra.sweep.dir={named}", "seed=1,2", *OFF]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hydra.sweep.dir = {named}: must be ")
    assert len(error.splitlines()) == 1
    assert not jobs


def test_a_sweeps_ledger_holds_no_secret(jobs, tmp_path):
    mine = "+callbacks.mine={_target_: builtins.dict, api_key: abc123secret}"
    assert main([*SWEEP, "hydra.sweep.dir=mine", "seed=1,2", "on_failure=continue", mine, *OFF]) == 0
    text = (tmp_path / "mine" / "sweep.json").read_text()
    assert "abc123secret" not in text
    (one, two) = json.loads(text)["jobs"]
    assert one["overrides"][0] == "seed=1"
    assert not any(line.startswith(("hydra", "on_failure")) for line in two["overrides"])  # the sweep's, not the job's
    assert json.loads(text)["swept"] == ["seed"]


class TestTuned:
    def test_each_optimizer_gets_its_own(self, jobs):
        main([*SWEEP, "optimizer=adamw,lion", *OFF])
        from lightning_opt.plan import tuned

        for job in jobs:
            record = tuned(job["config"]["optimizer"]["name"], "nano", "demo")
            assert job["tuned"]["source"] == record.source
            assert job["config"]["optimizer"]["lr"] == record.values["optimizer.lr"]

    def test_the_command_line_wins(self, jobs):
        main(["optimizer.lr=9", *OFF])
        assert jobs[0]["config"]["optimizer"]["lr"] == 9
        assert "optimizer.lr" not in jobs[0]["tuned"]["values"]

    def test_an_experiment_wins(self, jobs, tmp_path):
        (tmp_path / "mine" / "experiment").mkdir(parents=True)
        (tmp_path / "mine" / "experiment" / "hot.yaml").write_text("# @package _global_\noptimizer: {lr: 0.5}\n")
        assert main(["--config-dir", "mine", "experiment=hot", *OFF]) == 0
        assert jobs[0]["config"]["optimizer"]["lr"] == 0.5

    def test_it_follows_the_experiments_choices(self, jobs):
        main(["debug=smoke"])
        from lightning_opt.plan import tuned

        assert jobs[0]["tuned"]["source"] == tuned("adamw", "femto", "demo").source

    def test_it_can_be_turned_off(self, jobs, repository):
        main(["~tuned", *OFF])
        assert jobs[0]["tuned"] is None
        default = yaml.safe_load((repository / "conf" / "optimizer" / "adamw.yaml").read_text())
        assert jobs[0]["config"]["optimizer"]["roles"] == default["roles"]

    def test_a_record_can_be_named(self, jobs):
        assert main(["tuned=lion/nano_demo", *OFF]) == 0
        from lightning_opt.plan import tuned

        assert jobs[0]["tuned"]["source"] == tuned("lion", "nano", "demo").source

    def test_none_where_there_is_none(self, jobs, tmp_path, repository):
        (tmp_path / "mine" / "model").mkdir(parents=True)
        nano = (repository / "conf" / "model" / "nano.yaml").read_text()
        (tmp_path / "mine" / "model" / "mine.yaml").write_text(nano.replace("name: nano", "name: mine"))
        assert main(["--config-dir", "mine", "model=mine", *OFF]) == 0
        assert jobs[0]["config"]["model"]["name"] == "mine"
        assert jobs[0]["tuned"] is None


class TestOpenMaps:
    def test_a_new_role_needs_no_plus(self, jobs):
        assert main(["optimizer.roles.matrix.lr_scale=2", *OFF]) == 0
        assert jobs[0]["config"]["optimizer"]["roles"]["matrix"] == {"lr_scale": 2}

    def test_a_new_role_can_be_swept(self, jobs):
        assert main([*SWEEP, "optimizer.roles.head.lr_scale=1,2", *OFF]) == 0
        assert [job["config"]["optimizer"]["roles"]["head"]["lr_scale"] for job in jobs] == [1, 2]

    def test_a_callback_comes_and_goes(self, jobs):
        mine = "callbacks.mine._target_=lightning.pytorch.callbacks.LearningRateMonitor"
        assert main([mine, "~callbacks.memory", *OFF]) == 0
        assert "mine" in jobs[0]["config"]["callbacks"]
        assert "memory" not in jobs[0]["config"]["callbacks"]

    def test_weights_of_corpora(self, jobs):
        assert main(["data.weights={prose: 2, code: 1, math: 1}", *OFF]) == 0
        assert jobs[0]["config"]["data"]["weights"] == {"prose": 2, "code": 1, "math": 1}


def test_a_changed_shape_changes_the_parameter_count(jobs):
    main(["model.num_layers=8", *OFF])
    assert jobs[0]["config"]["model"]["non_embedding_params"] == 2 * 802_816


def test_instantiate_hands_down_plain_lists(jobs):
    main(OFF)
    build = jobs[0]["instantiate"]
    made = build({"_target_": "builtins.dict", "a": [1, {"b": [2]}]}, c=[3])
    assert_plain(made)
    assert made == {"a": [1, {"b": [2]}], "c": [3]}
    partial = build({"_target_": "builtins.dict", "_partial_": True, "x": [1]})
    assert_plain(partial.keywords["x"])


def test_what_a_constructor_refuses_stays_what_it_refused():
    from fractions import Fraction

    from lightning_opt.launch import instantiate
    from lightning_opt.plan import ConfigError

    with pytest.raises(ZeroDivisionError):
        instantiate({"_target_": "fractions.Fraction", "numerator": 1, "denominator": 0})
    assert instantiate({"_target_": "fractions.Fraction", "numerator": 1, "denominator": 2}) == Fraction(1, 2)
    with pytest.raises(ConfigError, match=r"^lr = -1: "):
        instantiate(
            {
                "_target_": "builtins.dict",
                "a": {"_target_": "lightning_opt.plan.check_value", "name": "lr", "value": -1},
            }
        )


def test_whole_numbers_reach_the_job_whole_and_hash_alike(jobs):
    assert main(["trainer.global_batch_size=8.0", "trainer.devices=1.0", "trainer.max_tokens=1e6", *OFF]) == 0
    assert main(["trainer.global_batch_size=8", "trainer.devices=1", "trainer.max_tokens=1000000", *OFF]) == 0
    odd, even = (job["config"] for job in jobs)
    assert type(odd["trainer"]["global_batch_size"]) is int
    assert config_hash(odd) == config_hash(even)
    assert_plain(odd)


class TestGivenModel:
    def test_a_hub_id_brings_its_tokenizer(self, jobs):
        assert main(["model=hf", "model.path=some-org/model", *OFF]) == 0
        assert jobs[0]["config"]["model"]["path"] == "some-org/model"

    def test_a_folder_that_is_too_short_for_the_sequences(self, jobs, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "config.json").write_text('{"max_position_embeddings": 64}')
        assert main(["model=hf", "model.path=mine", *OFF]) == 2
        assert capsys.readouterr().err.startswith("model.context_length = 256: must be at most 64")


@pytest.mark.parametrize("named", ["taken", "taken/file.txt", "/proc/none"])
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(jobs, tmp_path, capsys, named):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file.txt").write_text("mine")
    assert main([f"hydra.run.dir={named}", *OFF]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hydra.run.dir = {named}: must be ")
    assert len(error.splitlines()) == 1
    assert not jobs


def test_a_logger_whose_package_is_missing_is_no_reason_to_refuse(jobs, capsys):
    assert main(["logger.mine._target_=no_such_package.Logger", *OFF]) == 0
    assert len(jobs) == 1
    assert main(["logger.mine._target_=lightning.pytorch.loggers.CSVloger", *OFF]) == 2
    assert "did you mean CSVLogger" in capsys.readouterr().err

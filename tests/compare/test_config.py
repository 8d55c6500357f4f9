"""compare.yaml: what is read, and what is refused."""

import pytest
from small_compare import TUNE

from aesl_trl.compare.cells import Cell, rows
from aesl_trl.compare.config import read_config
from aesl_trl.errors import InputError
from aesl_trl.values import load_yaml


def test_grids(project):
    lists = {"learning_rate": [0.1, 0.2], "weight_decay": [0.0, 0.1]}
    points = [{"learning_rate": 0.1, "t_scaling": scale} for scale in (1.0, 2.0, 3.0, 4.0)]
    methods = {"nll": {"sft": {"cold_start_loss": "nll"}}, "aesl": {"sft": {}, "grid": points}, "base": {"sft": None}}
    config = read_config(project(methods=methods, reference=[], tune={"seeds": [7], "grid": lists}))
    assert [str(point) for point in config.points("nll")] == [
        f"learning_rate={rate},weight_decay={decay}" for rate in (0.1, 0.2) for decay in (0.0, 0.1)
    ]
    assert str(config.points("aesl")[1]) == "learning_rate=0.1,t_scaling=2.0"
    assert config.points("base") == []


def test_one_grid_of_rates_serves_every_row(project):
    """Where none is named; a grid that is named stays as it is, so that a comparison of an earlier version goes on."""
    config = read_config(project(tune={"seeds": [7]}))
    rates = [f"learning_rate={rate}" for rate in (1e-05, 3e-05, 0.0001, 0.0003, 0.001)]
    assert [str(point) for point in config.points("nll")] == [str(point) for point in config.points("aesl")] == rates
    assert (config.tune.extend, read_config(project(tune=TUNE)).tune.extend) == (2, 0)


def test_grids_have_todays_names(project):
    """A cell's config is read by today's names: by an old one in its grid it would never be done."""
    points = [{"diversity_samples": 4}, {"diversity_samples": 8}]
    methods = {"nll": {"sft": {"cold_start_loss": "nll"}}, "aesl": {"sft": {}, "grid": points}}
    tune = {"seeds": [7], "grid": {"diversity_samples": [4, 8]}}
    config = read_config(project(methods=methods, reference=[], tune=tune))
    names = ["diversity_num_samples=4", "diversity_num_samples=8"]
    assert [str(point) for point in config.points("nll")] == [str(point) for point in config.points("aesl")] == names
    for row in rows(config):
        point = config.points(row["method"])[0]
        cell = Cell(config, row["setting"], row["method"], row["selection"], 7, point, tuning=True)
        cell.write_configs()
        assert all(load_yaml(path) == values for path, values in cell.configs().items())
    both = {"diversity_samples": [4], "diversity_num_samples": [8]}
    with pytest.raises(InputError, match="tune.grid: diversity_samples is the old name of diversity_num_samples"):
        read_config(project(tune={"seeds": [7], "grid": both}))


AESL = {"cold_start_loss": "aesl"}
CHAIN = {name: {"config": f"{name}.yaml"} for name in ("sft", "grpo", "eval")}


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"method": {}}, ["unknown key 'method'", "'methods'"]),
        ({"methods": ...}, ["compare.yaml: methods is missing"]),
        ({"methods": {}}, ["methods is empty"]),
        ({"methods": {"nll": {}}}, ["methods.nll: sft is missing"]),
        ({"methods": {"nll": {"sft": {}, "selection": ["last"]}}}, ["methods.nll", "'selection'", "'selections'"]),
        (
            {"methods": {"nll": {"sft": {}, "selections": ["lst"]}}},
            ["selections is 'lst', but must be one of", "'last'"],
        ),
        ({"methods": {"nll": {"sft": {}, "selections": ["last", "last"]}}}, ["the same selection twice"]),
        ({"methods": {"nll": {"sft": {}, "selections": []}}}, ["neither selections nor rl_from_steps"]),
        ({"methods": {"base": {"sft": None, "selections": ["last"]}}}, ["selections need a cold start"]),
        ({"methods": {"nll": {"sft": {"seed": 3}}}}, ["methods.nll.sft: seed is set for each cell"]),
        ({"methods": {"nll": {"sft": {"dataset_name": "rws.jsonl"}}}}, ["methods.nll.sft", "'rows.jsonl'"]),
        ({"methods": {"a/b": {"sft": {}}}}, ["'a/b' names a folder"]),
        ({"methods": {"sft": {"sft": {}}}}, ["'sft' names a folder", "not tune or sft"]),
        (
            {"methods": {"a": {"sft": {}, "selections": ["last"]}, "a_last": {"sft": None}}},
            ["a_last and a would both write to the folder a_last"],
        ),
        ({"settings": {"base": {}}}, ["would both write to the folder base"]),
        ({"settings": {"few": {"stf": {}}}}, ["settings.few: unknown key 'stf'", "'sft'"]),
        ({"settings": {"few": {"methods": ["nl"]}}}, ["settings.few.methods: no method 'nl'", "'nll'"]),
        ({"seeds": []}, ["seeds must be different whole numbers"]),
        ({"seeds": [1, 1]}, ["seeds must be different whole numbers"]),
        ({"seeds": ["1"]}, ["seeds must be a list of int"]),
        ({"seeds": [0, 2**64]}, ["seeds: a seed is 18446744073709551616, but must be at least 0 and at most"]),
        ({"methods": {"a" * 300: {"sft": {}}}}, ["names a folder: at most 200 letters"]),
        (
            {"tune": {"seeds": [7], "grid": {"learning_rate": [10.0**-300], **{f"k{n}": [n] for n in range(60)}}}},
            ["names a folder: at most 200 characters"],
        ),
        ({"chain": {**CHAIN, "grpo": ["grpo.yaml"]}}, ["chain.grpo must be a mapping with the path config"]),
        ({"chain": {**CHAIN, "sft": {"config": 3}}}, ["chain.sft must be a mapping with the path config"]),
        ({"reference": ["nll"]}, ["reference: no row 'nll'", "nll/last"]),
        ({"rl_from_steps": [0]}, ["rl_from_steps is 0, but must be at least 1; RL from the base"]),
        ({"chain": {}}, ["chain.grpo is missing"]),
        ({"chain": {"grpo": {"config": "grpo.yaml"}}}, ["chain.eval is missing"]),
        (
            {"chain": {"grpo": {"config": "grpo.yaml"}, "eval": {"config": "eval.yaml"}}},
            ["chain.sft is missing"],
        ),
        (
            {"chain": {"grpo": {"config": "grop.yaml"}, "eval": {}, "sft": {}}},
            ["chain.grpo.config: grop.yaml", "'grpo.yaml'"],
        ),
        ({"chain": {"seed": 3}}, ["chain: seed is set for each cell"]),
        ({"chain": {"gpro": {}}}, ["chain: unknown key 'gpro'", "'grpo'"]),
        ({"tune": {**TUNE, "seeds": [1]}}, ["share 1: tune on seeds that the table does not use"]),
        ({"tune": {**TUNE, "keep": 3}}, ["tune.keep must lie from 1 to 2, the points of the grid, got 3"]),
        ({"tune": {**TUNE, "grid": {"learning_rate": 0.1}}}, ["tune.grid must hold lists of values"]),
        ({"tune": {**TUNE, "grid": {"learning_rate": [0.1, 0.1]}}}, ["the same point twice"]),
        ({"tune": {**TUNE, "grid": {"dataset_name": ["a/b"]}}}, ["dataset_name=a/b names a folder"]),
        ({"tune": {**TUNE, "grid": [{"seed": 3}]}}, ["tune.grid: seed must have plain values"]),
        (
            {
                "tune": TUNE,
                "reference": [],
                "methods": {"aesl": {"sft": AESL, "grid": {"t_scaling": [1.0, 2.0, 3.0]}}},
            },
            ["methods.aesl.grid has 3 points, tune.grid 2: every method gets the same budget"],
        ),
        (
            {"reference": [], "methods": {"aesl": {"sft": AESL, "grid": {"t_scaling": [1.0]}}}},
            ["needs a section tune"],
        ),
        (
            {"tune": TUNE, "reference": [], "methods": {"base": {"sft": None, "grid": {"t_scaling": [1.0]}}}},
            ["nothing to tune"],
        ),
        ({"chain": {**CHAIN, "grpo": {"config": "grpo.yaml", "seed": 3}}}, ["chain.grpo: seed is set for each cell"]),
        ({"tune": {**TUNE, "extend": 3}}, ["tune: extend is 3, but must be at least 0 and at most 2"]),
        (
            {"tune": {**TUNE, "grid": {"learning_rate": ["1e-5", "fast"]}}},
            ["learning_rate must be a number", "'fast'"],
        ),
        ({"tune": TUNE, "bases": {"a": {"model": "base"}}}, ["tune.base is missing: which of a is tuned on"]),
        (
            {"tune": {**TUNE, "base": "b"}, "bases": {"aa": {"model": "base"}}},
            ["tune.base: no base 'b' among bases"],
        ),
        ({"tune": {**TUNE, "base": "a"}, "bases": {"a": {"model": "base"}}}, ["leaves a out, and bases has no other"]),
        ({"bases": {"a": {"sft": {}}}}, ["bases.a: model is missing"]),
        ({"bases": {"a": {"model": "./bse"}}}, ["bases.a.sft: model_name_or_path: ./bse does not exist", "'base'"]),
        ({"bases": {"sft": {"model": "base"}}}, ["bases: 'sft' names a folder"]),
        ({"bases": {"nll_last": {"model": "base"}}}, ["would both write to the folder nll_last"]),
        ({"rl_runs": 0}, ["rl_runs is 0, but must be at least 1"]),
        ({"rl_runs": 2, "seeds": [1, 10_001]}, ["rl_runs: two starts would share a seed of RL"]),
        ({"estimate": {"sft_s": 3}}, ["estimate: rl_s is missing"]),
        ({"output_dir": "sft.yaml"}, ["output_dir", "is a file"]),
    ],
)
def test_refused_configs(project, changes, parts):
    with pytest.raises(InputError) as error:
        read_config(project(**changes))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)

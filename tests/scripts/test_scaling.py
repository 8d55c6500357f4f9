"""scaling: two real processes share the work, and the table compares the busiest of them with one."""

import json

import pytest
import record
import scaling


def times(**works):
    return {name: works.get(name.split()[0], [1.0, 1.0]) for name in scaling.WORKS}


def test_the_busiest_process_is_compared_with_one():
    alone = {"alone": times(SFT=[2.0, 4.0])}
    two = [
        {"strong": times(SFT=[1.0, 2.5]), "weak": times(SFT=[2.0, 4.0]), "reduce": [0.25, 0.5]},
        {"strong": times(SFT=[1.5, 2.0]), "weak": times(SFT=[2.5, 4.0]), "reduce": [0.75, 0.25]},
    ]
    two[0]["strong"]["evaluation"] = [1.5, 1.25]  # of 1
    args = scaling.arguments([])
    found = scaling.make_table(alone, two, args)
    name, strong, both, weak = found["rows"][0]
    assert name == "SFT step"
    # 1.5 of 2, 2.5 of 4; 2.5 of 2, 4.5 of 4; 2.5 of 2, 4 of 4
    assert (strong["low"], strong["high"]) == (0.625, 0.75)
    assert (both["low"], both["high"]) == (1.125, 1.25)
    assert (weak["low"], weak["high"]) == (1.0, 1.25)
    assert found["rows"][4][0] == "what rank 0 does alone, of a whole evaluation"
    assert (found["rows"][4][1]["low"], found["rows"][4][1]["high"]) == (0.25, 0.5)
    assert found["rows"][-1][1] == record.spread([0.25, 0.5 / 3])  # 0.75 and 0.5 of a step of 3
    assert record.markdown(found).count("\n") == 7


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    args = scaling.arguments("--repeats 1 --rows 4 --length 8 --prompts 2".split())
    ranks = scaling.run(2, args, tmp_path)
    assert len(ranks) == 2
    for found in ranks:
        assert found.keys() == {"strong", "weak", "reduce"}
        assert all(
            len(found[kind][name]) == 1 and found[kind][name][0] > 0
            for kind in ("strong", "weak")
            for name in scaling.WORKS
        )
    samples = [json.loads((tmp_path / f"{kind}-2/eval-0/evaluation.json").read_text()) for kind in ("strong", "weak")]
    assert [found["num_prompts"] for found in samples] == [2, 4]

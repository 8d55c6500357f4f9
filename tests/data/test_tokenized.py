"""Rows as TRL prepared them: what cannot be trained on, and what could not end a sample."""

import warnings

import pytest
from datasets import Dataset
from refusals import refused

from aesl_trl.data.tokenized import check_trainable


def test_trainable():
    check_trainable(Dataset.from_list([{"labels": [-100, -100]}, {"labels": [-100, 5]}]), 2)
    lost = Dataset.from_list([{"labels": [-100, -100]}, {"labels": [7, -100]}])
    refused(["every row lost its completion to max_length=2"], check_trainable, lost, 2)
    refused(["max_length=2"], check_trainable, lost.select([]), 2)
    refused(["masks"], check_trainable, lost, None)


def test_a_token_without_an_embedding():
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 9], "labels": [3, 9]}])
    check_trainable(rows, None, num_embeddings=10)
    check_trainable(rows.select([0]), None, num_embeddings=3)
    refused(["token 9", "the model 9 embeddings"], check_trainable, rows, None, num_embeddings=9)


def test_all_rows_truncated_by_trl(tiny_model_dir, tmp_path):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=2, report_to="none")
    rows = Dataset.from_list([{"prompt": "a long prompt", "completion": "c"}] * 3)
    trainer = SFTTrainer(str(tiny_model_dir), args=args, train_dataset=rows)
    refused(["max_length=2"], check_trainable, trainer.train_dataset, args.max_length)


STOPS = {9: "<end>"}


def rows(*labels, **more):
    return Dataset.from_list([{"input_ids": [abs(one) for one in each], "labels": each, **more} for each in labels])


def test_a_template_without_an_end_of_turn_is_refused():
    parts = ["train_dataset", "no token that ends a sample (<end>)", "the chat template ends no turn"]
    refused(parts, check_trainable, rows([9, 2, 3], [1, 2, -100]), 100, stops=STOPS)  # the first token is not trained


def test_rows_that_are_all_cut_before_their_end_are_refused():
    parts = ["max_length=3 cuts 2 of 2 rows before their end", "raise it"]
    refused(parts, check_trainable, rows([1, 2, 3], [4, 5, 6]), 3, stops=STOPS)


def test_few_ends_are_a_warning_with_their_share():
    few = rows([1, 2, 3], [4, 5, 6], [7, 7, 7], [1, 9])
    with pytest.warns(UserWarning, match="only 25% of .* train an end .*max_length=3 cuts 3 of 4 rows"):
        assert check_trainable(few, 3, stops=STOPS) == {2, 3, 5, 6, 7, 9}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trainable(rows([1, 2, 9], [1, 2, 3]), 3, stops=STOPS)
        check_trainable(rows([1, 9, 3, 9, 1, 2], seq_lengths=[2, 2, 2]), 6, stops=STOPS)  # two of three documents


def test_of_a_stream_the_first_rows_are_a_warning():
    stream = rows(*[[1, 2, 3]] * 70).to_iterable_dataset()
    with pytest.warns(UserWarning, match="the first 64 rows of train_dataset trains no token that ends a sample"):
        check_trainable(stream, None, stops=STOPS)


def test_a_short_stream_is_known_to_its_end():
    stream = rows([1, 2, 3]).to_iterable_dataset()
    refused(["trains no token that ends a sample"], check_trainable, stream, None, stops=STOPS)
    nothing_left = stream.filter(lambda row: False)
    refused(["nothing to learn", "max_length=3: raise it"], check_trainable, nothing_left, 3, stops=STOPS)


@pytest.mark.parametrize("more", [{}, {"seq_lengths": [3, 5]}])
def test_a_row_longer_than_the_models_positions_is_refused(more):
    packed = rows([1, 2, 3, 4, 5, 6, 7, 9], **more)
    longest = 5 if more else 8
    check_trainable(packed, None, stops=STOPS, num_positions=longest)
    parts = [f"a row of {longest} tokens, and the model {longest - 1} positions"]
    refused(parts, check_trainable, packed, None, stops=STOPS, num_positions=longest - 1)

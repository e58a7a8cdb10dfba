"""Corpora: the order of the data, each label once, the floor, and each mistake as one line."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosetrainer.data import token_file
from rosetrainer.data.batches import IGNORED, open_corpus, read_meta
from rosetrainer.data.markov import MarkovChain, leak_report, mean_and_error
from rosetrainer.environment import prepare_command
from rosetrainer.validation import ConfigError


def write_corpus(folder: Path, train, val, vocab_size: int = 65536, **more) -> Path:
    """A corpus by hand: prepare's writer has tests of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name, ids in (("train.bin", train), ("val.bin", val)):
        content = np.asarray(ids).astype("<u2").tobytes()
        (folder / name).write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    meta = {
        "source": "python-docs",
        "options": {},
        "tokenizer": "bytes",
        "vocab_size": vocab_size,
        "dtype": "uint16",
        "train_tokens": len(train),
        "val_tokens": len(val),
        "sha256": hashes,
        **more,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Token i is the number i, so a window shows where it was read."""
    folder = tmp_path_factory.mktemp("corpora") / "python-docs"
    return write_corpus(folder, np.arange(1000), np.arange(1000))


def remedy(folder: Path) -> str:
    own = f"ids of your own go into another folder: `{prepare_command()} import --help`"
    return f"`{prepare_command()} python-docs --out {folder}` makes it anew; {own}"


def message(call) -> str:
    with pytest.raises(ConfigError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_labels_are_the_inputs_shifted_by_one(counting):
    inputs, labels = open_corpus(counting, 16).train_batch(1, 0, 4, range(4))
    assert inputs.shape == labels.shape == (4, 16)
    assert inputs.dtype == labels.dtype == np.int64
    assert (labels == inputs + 1).all()
    assert (np.diff(inputs, axis=1) == 1).all()


def test_a_label_follows_its_own_input_where_a_window_goes_from_the_end_to_the_beginning(counting):
    inputs, labels = open_corpus(counting, 300).train_batch(1, 0, 12, range(12))  # 4 epochs
    assert (labels == inputs + 1).all()
    steps = np.diff(inputs, axis=1)
    assert ((steps == 1) | (steps == -998)).all()
    assert (steps == -998).sum() in (3, 4)  # an epoch that begins after the gap has none


@settings(max_examples=30)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), ranks=st.sampled_from([1, 2, 3, 6]))
def test_a_batch_is_the_same_in_every_layout_and_after_a_resume(counting, seed, step, ranks):
    whole, _ = open_corpus(counting, 16).train_batch(seed, step, 12, range(12))
    share = 12 // ranks
    rows = []
    for rank in range(ranks):
        fresh = open_corpus(counting, 16)  # a rank of its own, resumed at this step
        for row in range(rank * share, (rank + 1) * share):
            rows.append(fresh.train_batch(seed, step, 12, range(row, row + 1))[0])
    assert (np.concatenate(rows) == whole).all()


@pytest.mark.parametrize(
    ("tokens", "context_length"),
    [
        (767, 256),
        (1000, 16),
        (1000, 500),
        (1000, 501),
        (1000, 1),
        (1001, 250),
        (17, 16),
        (33, 32),
        (2, 1),
        (31, 16),
        (513, 256),
    ],
)
def test_all_labels_come_equally_often(tmp_path, tokens, context_length):
    """After any number of epochs the counts of two labels differ by one at most.

    By none where context_length divides their number. Between epochs they differ by two at most.
    """
    folder = write_corpus(tmp_path, np.arange(tokens), np.arange(tokens))
    corpus = open_corpus(folder, context_length)
    labels_in_all = tokens - 1
    windows = labels_in_all // context_length
    counts, borders = np.zeros(tokens, int), set()
    for epoch in range(40):
        _, labels = corpus.train_batch(5, epoch, windows, range(windows))
        assert np.unique(labels).size == labels.size == windows * context_length
        half_way = counts.copy()
        np.add.at(half_way, labels[: windows // 2], 1)
        assert np.ptp(half_way[1:]) <= 2
        np.add.at(counts, labels, 1)
        assert counts[0] == 0  # no token stands before it
        assert np.ptp(counts[1:]) <= (1 if labels_in_all % context_length else 0)
        borders.add(int(labels[:, 0].min()) % context_length)
    assert len(borders) > 1 or context_length == 1


def test_windows_come_in_another_order_in_each_epoch(counting):
    corpus = open_corpus(counting, 16)
    first, second = (corpus.train_batch(5, epoch, 62, range(62))[1] for epoch in range(2))
    assert (np.diff(first[:, 0]) % 999 == 16).sum() < 10
    assert not (first == second).all()


def test_another_seed_and_another_step_give_another_batch(counting):
    corpus = open_corpus(counting, 16)
    batch = corpus.train_batch(1, 0, 4, range(4))[0]
    assert not (batch == corpus.train_batch(2, 0, 4, range(4))[0]).all()
    assert not (batch == corpus.train_batch(1, 1, 4, range(4))[0]).all()


def test_the_order_is_pinned(counting):
    """A checkpoint must find the same data on another machine, and with another numpy."""
    corpus = open_corpus(counting, 16)
    starts = [corpus.train_batch(1337, step, 4, range(4))[0][:, 0].tolist() for step in (0, 15, 99)]
    assert starts == [[621, 573, 829, 749], [653, 765, 662, 150], [227, 83, 659, 691]]


@settings(max_examples=60)
@given(
    tokens=st.none() | st.integers(1, 1100),
    batch_size=st.integers(1, 9),
    dp_size=st.integers(1, 7),
    context_length=st.sampled_from([1, 16, 33, 999]),
)
def test_val_has_each_label_once_over_any_dp_size(
    counting, tokens, batch_size, dp_size, context_length
):
    corpus = open_corpus(counting, context_length)
    counts, seen = set(), []
    for rank in range(dp_size):
        batches = list(corpus.val_batches(tokens, batch_size, rank, dp_size))
        counts.add(len(batches))
        for inputs, labels, floors in batches:
            assert not floors.any()
            assert inputs.shape == labels.shape == (batch_size, context_length)
            real = labels != IGNORED
            assert (labels[real] == inputs[real] + 1).all()
            assert (real.all(axis=1) == real.any(axis=1)).all()
            seen += labels[real].tolist()
    assert len(counts) == 1
    windows = max(min(tokens or 999, 999) // context_length, 1)
    assert sorted(seen) == list(range(1, windows * context_length + 1))


def markov_corpus(folder: Path, order: int = 2, alphabet: int = 3, length: int = 3000):
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.ones(alphabet), size=alphabet**order)
    tokens = rng.integers(alphabet, size=order).tolist()
    for _ in range(length - order):
        row = int("".join(map(str, tokens[-order:])), alphabet)
        tokens.append(int(rng.choice(alphabet, p=table[row])))
    losses = [math.log(alphabet)] * (order - 1)
    for i in range(order, length):
        row = sum(t * alphabet**age for age, t in enumerate(reversed(tokens[i - order : i])))
        losses.append(-math.log(table[row, tokens[i]]))
    chain = {"order": order, "probabilities": table.tolist()}
    write_corpus(folder, tokens, tokens, alphabet, chain=chain, floor_nats=0.5, tokenizer="markov")
    return np.array(losses)


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("context_length", [1, 10, 16])
def test_floor_losses_are_aligned_with_the_labels(tmp_path, order, context_length):
    losses = markov_corpus(tmp_path, order)
    corpus = open_corpus(tmp_path, context_length)
    assert corpus.has_floor
    seen = []
    for rank in range(2):
        for _, labels, floor in corpus.val_batches(200, 3, rank, 2):
            assert (floor[labels == IGNORED] == 0).all()
            seen += floor[labels != IGNORED].tolist()
    expected = losses[: 200 // context_length * context_length]
    np.testing.assert_allclose(sorted(seen), sorted(expected), rtol=1e-12)
    first = next(corpus.val_batches(200, 3))[2][0]
    np.testing.assert_allclose(first, losses[:context_length], rtol=1e-12)


def test_label_losses_of_a_chain_worked_by_hand():
    chain = MarkovChain(1, np.array([[0.25, 0.75], [0.5, 0.5]]))
    losses = chain.label_losses(np.array([0, 1, 0, 0]))
    np.testing.assert_allclose(losses, -np.log([0.75, 0.5, 0.25]))
    assert MarkovChain(3, np.full((8, 2), 0.5)).label_losses(np.array([1, 0])).size == 1


def test_leak_report():
    assert leak_report(-0.0299, 0.01) is None
    assert leak_report(0.5, 0.01) is None
    assert leak_report(math.nan, 0.01) is None
    assert "0.0310 nats under the floor" in (leak_report(-0.031, 0.01) or "")


def test_mean_and_error():
    values = np.array([0.5, -1.0, 2.0, 0.25])
    mean, error = mean_and_error(4, values.sum(), (values**2).sum())
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std() / 2)


@pytest.fixture
def small(tmp_path):
    return write_corpus(tmp_path / "small", np.arange(30), np.arange(20), 40)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_damaged_files(small, name):
    path, whole = small / name, (small / name).read_bytes()
    anew = remedy(small)
    path.unlink()
    assert message(lambda: open_corpus(small, 4)) == f"{path} is missing; {anew}"
    path.mkdir()
    assert message(lambda: open_corpus(small, 4)) == f"{path} is not a file; {anew}"
    path.rmdir()
    os.mkfifo(path)
    assert message(lambda: open_corpus(small, 4)) == f"{path} is not a file; {anew}"
    path.unlink()
    path.write_bytes(b"")
    assert message(lambda: open_corpus(small, 4)) == f"{path} is empty; {anew}"
    path.write_bytes(whole[:-1])
    assert message(lambda: open_corpus(small, 4)) == (
        f"{path} has {len(whole) - 1} bytes, an odd number: it cannot be uint16 tokens; {anew}"
    )
    path.write_bytes(whole[:-2])
    tokens = len(whole) // 2
    assert message(lambda: open_corpus(small, 4)) == (
        f"{path} has {tokens - 1} tokens, but meta.json says {tokens}; {anew}"
    )


def test_too_short_for_the_context(small):
    assert message(lambda: open_corpus(small, 20)) == (
        f"{small}/val.bin has 20 tokens, too few for context_length=20, which takes 21; "
        "context_length can be 1 to 19"
    )
    assert "train.bin has 30 tokens" in message(lambda: open_corpus(small, 40))
    open_corpus(small, 19)
    write_corpus(small, [1, 2], [1])
    assert message(lambda: open_corpus(small, 1)).endswith("takes 2; take a longer text")


@pytest.mark.parametrize("index", [0, 5, 9, 10, 19])
def test_an_impossible_id_is_found_anywhere(small, monkeypatch, index):
    monkeypatch.setattr(token_file, "SCAN", 10)
    ids = np.arange(20)
    ids[index:] = 40
    write_corpus(small, np.arange(30), ids, 40)
    assert message(lambda: open_corpus(small, 4)) == (
        f"{small}/val.bin: token {index} (byte {2 * index}) is 40, not below vocab_size=40; "
        f"{remedy(small)}"
    )


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("with_blocks", [False, True])
def test_another_corpus_of_equal_size_is_refused(small, name, with_blocks):
    path = small / name
    if with_blocks:
        files = ("train.bin", "val.bin")
        blocks = {f: token_file.hashes(small / f)[1] for f in files}
        change(small, blocks=blocks)
    open_corpus(small, 4)
    path.write_bytes(path.read_bytes()[2:] + path.read_bytes()[:2])
    text = message(lambda: open_corpus(small, 4))
    assert text.startswith(f"{path}: bytes 0 to {path.stat().st_size} are not what meta.json")
    assert text.endswith(f"describes; {remedy(small)}")
    open_corpus(small, 4, read_all=False)  # another rank of the machine has read it


@pytest.mark.parametrize("function", ["open", "pread"])
def test_a_file_that_cannot_be_read(small, monkeypatch, function):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_file.os, function, refuse)
    assert message(lambda: open_corpus(small, 4)).startswith(
        f"cannot read {small}/train.bin: Permission denied"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read(small):
    small.chmod(0)
    try:
        assert message(lambda: open_corpus(small, 4)).startswith(
            f"{small}/meta.json: it cannot be read: Permission denied"
        )
    finally:
        small.chmod(0o700)


def test_a_file_that_shrinks_while_in_use(small):
    corpus = open_corpus(small, 10)
    os.truncate(small / "val.bin", 15)
    os.truncate(small / "train.bin", 4)
    assert message(lambda: list(corpus.val_batches(None, 1))) == (
        f"{small}/val.bin ends before byte 22; 40 bytes were there, it was cut while in use; "
        f"{remedy(small)}"
    )
    assert "train.bin ends before byte" in message(lambda: corpus.train_batch(0, 0, 1, range(1)))


def test_a_file_that_changes_while_in_use(small):
    corpus = open_corpus(small, 10)
    with (small / "val.bin").open("r+b") as file:
        file.seek(14)
        file.write(b"\xff\xff")
    assert "val.bin: token 7 (byte 14) is 65535, not below vocab_size=40" in message(
        lambda: list(corpus.val_batches(None, 1))
    )


def change(folder: Path, **values) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta.update(values)
    meta = {key: value for key, value in meta.items() if value != "gone"}
    (folder / "meta.json").write_text(json.dumps(meta))


CHAIN = {"order": 1, "probabilities": [[1 / 40] * 40] * 40}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"dtype": "gone", "options": "gone"}, "it lacks the keys options, dtype"),
        (
            {"colour": 1},
            "it has unknown keys colour, which a newer rosetrainer may have written",
        ),
        ({"dtype": "uint8"}, "dtype='uint8' must be uint16 or uint32"),
        ({"vocab_size": 0}, "vocab_size=0 must be from 1 to 16777216"),
        ({"train_tokens": "30"}, "train_tokens='30' must be an integer"),
        ({"options": []}, "options=[] must be a dict"),
        ({"sha256": {"train.bin": 1}}, "sha256 must hold a text for train.bin and val.bin each"),
        ({"floor_nats": 1.0}, "it must hold chain and floor_nats, or neither"),
        (
            {"floor_nats": 1.0, "chain": {**CHAIN, "order": 2}},
            "chain must hold an order and probabilities, vocab_size^order rows of 40",
        ),
        (
            {"floor_nats": 1.0, "chain": {"probabilities": [[1], "x"]}},
            "chain must hold an order and probabilities, vocab_size^order rows of 40",
        ),
        (
            {"floor_nats": 1.0, "chain": {"order": 1, "probabilities": [[1 / 39] * 40] * 40}},
            "chain: probabilities must be above 0, and each row's sum 1",
        ),
    ],
)
def test_wrong_meta(small, values, problem):
    change(small, **values)
    assert message(lambda: read_meta(small)) == (
        f"{small}/meta.json: {problem}; `{prepare_command()} python-docs --out data/small` makes a "
        "corpus in another folder"
    )


def test_a_chain_that_fits_is_taken(small):
    change(small, chain=CHAIN, floor_nats=1.0)
    assert open_corpus(small, 4).has_floor


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000], ids=range(5))
def test_meta_that_is_not_json(small, content):
    (small / "meta.json").write_bytes(content)
    assert message(lambda: read_meta(small)).startswith(f"{small}/meta.json")


def test_meta_that_is_no_object(small):
    (small / "meta.json").write_text("[]")
    assert "it should hold an object, not list" in message(lambda: read_meta(small))


def test_descriptors_are_closed(small):
    def count() -> int:
        return len(os.listdir("/dev/fd"))

    before = count()
    for _ in range(5):
        open_corpus(small, 4)
    assert count() == before

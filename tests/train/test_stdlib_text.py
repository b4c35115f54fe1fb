"""The text task: the corpus and its split, the reference methods, the GPT, and what evaluation counts."""

import math
import re
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import duotone.torch as dt
from duotone import corpus
from duotone.errors import TaskError
from duotone.torch.watching import saved_for_backward
from duotone.train.tasks.gpt import GPT, GPTConfig, rotary_angles, rotate
from duotone.train.tasks.stdlib_text import EPOCH_BATCHES, SIZES, Size, judged_loss, stdlib_text, text_task, window_loss

SHAPE = GPTConfig(layers=2, heads=2, width=32, context=8)
SIZE = Size(SHAPE, windows=4, held_out_windows=6, steps=1, learning_rate=1e-3, warmup_steps=0)
NEEDED = 6 * 8 + 1


def text_of(train_bytes, held_out_bytes):
    """Return a corpus of the two byte strings."""
    return corpus.Corpus(*(np.frombuffer(part, np.uint8) for part in (train_bytes, held_out_bytes)), files=2)


def random_bytes(count, seed, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, count, dtype=np.uint8).tobytes()


class Bigram(nn.Module):
    """Predicts as `corpus.bigram_bits` does, and keeps the tokens that it was asked about."""

    def __init__(self, train_bytes):
        super().__init__()
        counts = np.full((256, 256), corpus.SMOOTHING)
        np.add.at(counts, (train_bytes[:-1], train_bytes[1:]), 1)
        self.logits = nn.Parameter(torch.tensor(np.log(counts), dtype=torch.float32))
        self.seen = []

    def forward(self, tokens):
        self.seen.append(tokens)
        return self.logits[tokens]


def write_library(root, count):
    """Write `count` modules, each of its own text, and return their relative paths."""
    paths = [f"package{i % 3}/module{i}.py" for i in range(count)]
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(f"<{i}>")
    return paths


def test_every_file_is_in_one_part_whole(tmp_path):
    paths = write_library(tmp_path, 200)
    text = corpus.standard_library(tmp_path)
    train, held_out = (part.tobytes().split(corpus.SEPARATOR)[:-1] for part in (text.train, text.held_out))
    assert sorted(train + held_out) == sorted(b"<%d>" % i for i in range(200))
    assert {f"<{paths.index(path)}>".encode() for path in paths if corpus.is_held_out(path)} == set(held_out)
    # a binomial count of 200 at 1/20
    assert 3 <= len(held_out) <= 20
    assert text.files == 200


def test_files_are_in_the_order_of_their_hash(tmp_path):
    write_library(tmp_path, 50)
    hashes = [zlib.crc32(path.encode()) for path in corpus.source_files(tmp_path)]
    assert len(hashes) == 50
    assert hashes == sorted(hashes)


def test_a_file_stays_in_its_part_when_others_come_and_go(tmp_path):
    paths = write_library(tmp_path, 200)
    before = corpus.standard_library(tmp_path).held_out.tobytes()
    (tmp_path / next(path for path in paths if not corpus.is_held_out(path))).unlink()
    assert corpus.standard_library(tmp_path).held_out.tobytes() == before


def test_only_ordinary_source_is_read(tmp_path):
    for path in (
        *("a.py", "b/c.py", "b/test/d.py", "test/e.py", "f/tests/g.py", "encodings/h.py", "b/readme.txt"),
        *("site-packages/i.py", "dist-packages/j.py", "_sysconfigdata_linux.py", "__pycache__/k.py"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert sorted(corpus.source_files(tmp_path)) == ["a.py", "b/c.py"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_library_without_sources_says_what_to_do(tmp_path, count):
    write_library(tmp_path, count)
    message = f"found {count} source files of the standard library in {tmp_path}, too few to train on"
    with pytest.raises(TaskError, match=re.escape(message)):
        corpus.standard_library(tmp_path)
    with pytest.raises(TaskError, match="found 0 source files"):
        corpus.standard_library(tmp_path / "python311.zip")


def test_the_running_library_is_ordinary_code():
    text = corpus.standard_library()
    again = corpus.standard_library()
    assert np.array_equal(text.train, again.train)
    assert np.array_equal(text.held_out, again.held_out)
    assert len(text.train) > 4e6
    assert 1e5 < len(text.held_out) < len(text.train) / 10
    assert (text.train == ord(" ")).mean() > 0.1
    assert text.facts["train"] == f"{len(text.train) / 1e6:.2f} MB"


def test_the_reference_methods_by_hand():
    train, text = (np.frombuffer(part, np.uint8) for part in (b"aab", b"xab"))
    # unigram: 3 bytes and 256 * 0.1 to begin with, of which a has 2.1 and b has 1.1
    assert corpus.unigram_bits(train, text) == pytest.approx(-(math.log2(2.1 / 28.6) + math.log2(1.1 / 28.6)) / 2)
    # bigram: x was never followed by anything, a once by a and once by b
    assert corpus.bigram_bits(train, text) == pytest.approx(-(math.log2(0.1 / 25.6) + math.log2(1.1 / 27.6)) / 2)


def test_xz_compresses_repetition_and_nothing_else():
    noise = np.frombuffer(random_bytes(10_001, 0), np.uint8)
    assert 8 < corpus.xz_bits(noise) < 8.1
    assert corpus.xz_bits(np.zeros(10_001, np.uint8)) < 0.1


def test_evaluation_predicts_each_byte_once_and_the_baselines_the_same_bytes():
    text = text_of(random_bytes(5000, 1, 97, 107), random_bytes(NEEDED + 20, 2, 97, 107))
    task = text_task("letters", text, SIZE)
    bigram = Bigram(text.train)
    figures = task.evaluate(bigram)
    assert torch.cat([part.flatten() for part in bigram.seen]).tolist() == text.held_out[: NEEDED - 1].tolist()
    assert figures["bits_per_byte"] == pytest.approx(task.baselines["bigram"], rel=1e-5)
    assert figures["loss"] == pytest.approx(figures["bits_per_byte"] * math.log(2))
    # skipping, repeating or shifting bytes would show in the figure
    assert corpus.bigram_bits(text.train, text.held_out[1 : NEEDED + 1]) != pytest.approx(
        task.baselines["bigram"], rel=1e-5
    )


def test_batches_follow_their_generator_and_stay_in_the_training_text():
    text = text_of(random_bytes(300, 3, 0, 128), random_bytes(NEEDED, 4, 128, 256))
    task = text_task("letters", text, SIZE)
    one, same, other = (list(task.batches(torch.Generator().manual_seed(seed))) for seed in (1, 1, 2))
    assert len(one) == EPOCH_BATCHES
    assert all(batch.shape == (4, 9) and batch.dtype == torch.uint8 for batch in one)
    assert task.units_in(one[0]) == 4 * 8
    windows = torch.cat(one)
    assert torch.equal(windows, torch.cat(same))
    assert not torch.equal(windows, torch.cat(other))
    train = text.train.tobytes()
    assert all(window.numpy().tobytes() in train for window in windows)


def test_every_window_of_the_training_text_is_drawn():
    text = text_of(bytes(range(11)), bytes(NEEDED))
    task = text_task("three windows", text, SIZE)
    firsts = {int(window[0]) for batch in task.batches(torch.Generator().manual_seed(0)) for window in batch}
    assert firsts == {0, 1, 2}


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (8, NEEDED, "the train text has 8 bytes, 9 are needed"),
        (9, NEEDED - 1, "the held-out text has 48 bytes, 49 are needed"),
        (0, 0, "the train text has 0 bytes"),
    ],
)
def test_too_little_text_is_refused(train, held_out, message):
    with pytest.raises(TaskError, match=message):
        text_task("letters", text_of(bytes(train), bytes(held_out)), SIZE)


def test_a_byte_changes_no_logit_before_it():
    torch.manual_seed(0)
    model = GPT(SHAPE)
    tokens = torch.randint(256, (2, 8))
    changed = tokens.clone()
    changed[:, 5] ^= 1
    with torch.no_grad():
        logits, others = model(tokens), model(changed)
    assert torch.equal(logits[:, :5], others[:, :5])
    assert (logits[:, 5:] != others[:, 5:]).any(dim=-1).all()


def test_the_order_of_earlier_bytes_matters():
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=1, heads=2, width=32, context=8))
    with torch.no_grad():
        one, other = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    # with one layer and no positions the last byte would see the same set both times
    assert not torch.allclose(one[:, -1], other[:, -1], rtol=1e-4, atol=1e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    query, key = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 20, 16)
    angles = rotary_angles(20, 16, torch.device("cpu"))
    rotated_query, rotated_key = rotate(query, *angles), rotate(key, *angles)
    torch.testing.assert_close(rotated_query.norm(dim=-1), query.norm(dim=-1))
    scores = rotated_query @ rotated_key.T
    for distance in (-7, 0, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert abs(scores[0, 0] - scores[0, 7]) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gpt_runs_in_the_dtype_of_its_weights(dtype):
    torch.manual_seed(0)
    model = GPT(SHAPE)
    tokens = torch.randint(256, (2, 8))
    exact = model(tokens)
    model.to(dtype)
    logits = model(tokens)
    assert logits.dtype == dtype
    # 0.7 epsilon was measured for several seeds and both formats
    assert (logits.float() - exact).norm() < torch.finfo(dtype).eps * exact.norm()
    logits.float().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.dtype == dtype for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_is_rounded_once(dtype):
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = rotary_angles(30, 16, torch.device("cpu"))
    assert angles[0].dtype == torch.float32
    assert torch.equal(rotate(x, *angles), rotate(x.float(), *angles).to(dtype))


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, heads=2, width=128, context=8))
    for name, parameter in model.named_parameters():
        expected = 0.01 if "to_residual" in name else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_blocks_add_to_the_residual_stream():
    torch.manual_seed(0)
    model = GPT(SHAPE)
    for name, parameter in model.named_parameters():
        if "to_residual" in name:
            nn.init.zeros_(parameter)
    tokens = torch.randint(256, (2, 8))
    assert torch.equal(model(tokens), model.head(model.norm(model.embedding(tokens))))


def test_the_models_own_loss_is_that_of_its_logits():
    torch.manual_seed(0)
    model = GPT(SHAPE)
    windows = torch.randint(256, (4, 9), dtype=torch.uint8)
    assert torch.equal(window_loss(model, windows), judged_loss(model, windows))
    dt.cast(model, "bf16")
    loss = window_loss(model, windows)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, judged_loss(model, windows))


def test_sixteen_bit_logits_are_never_kept_in_float32():
    torch.manual_seed(0)
    model = dt.cast(GPT(GPTConfig(layers=1, heads=1, width=2, context=8)), "bf16")
    # below 4 MiB of FP32 they are kept so, which is quicker
    windows = torch.randint(256, (600, 9), dtype=torch.uint8)
    logits = 600 * 8 * 256
    with saved_for_backward(model.parameters()) as saved:
        window_loss(model, windows)
    assert saved.activation_bytes["bfloat16"] >= 2 * logits
    assert saved.activation_bytes["float32"] < logits
    assert saved.total_activation_bytes < 3 * logits


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(TaskError, match="layers is 0; it must be at least 1"):
        GPTConfig(layers=0, heads=1, width=2, context=1)
    with pytest.raises(TaskError, match=r"width 36 does not divide into 4 heads of even width; .* multiple of 8"):
        GPTConfig(layers=1, heads=4, width=36, context=1)
    with pytest.raises(TaskError, match="got 9 tokens; this model's context is 8"):
        GPT(SHAPE)(torch.zeros(1, 9, dtype=torch.int64))


def test_the_tiny_size_learns_from_near_eight_bits():
    torch.manual_seed(0)
    task = stdlib_text("tiny")
    assert 7.9 < task.evaluate(task.model)["bits_per_byte"] < 8.1
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=SIZES["tiny"].learning_rate)
    for batch in task.batches(torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        task.loss(task.model, batch).backward()
        optimizer.step()
    figures = task.evaluate(task.model)
    assert figures["bits_per_byte"] < 4.8
    assert figures == task.evaluate(task.model)


def test_the_sizes_grow():
    counts = [
        sum(parameter.numel() for parameter in GPT(size.model).to("meta").parameters())
        for name, size in SIZES.items()
        if name != "medium"
    ]
    assert counts == sorted(counts)
    assert 1.5e6 < counts[1] < 4e6
    assert SIZES["medium"].model == GPTConfig(layers=12, heads=12, width=768, context=1024)

"""A text as examples: contiguous parts, windows, symbols that the training part alone defines."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2l_lightning import MetaData, ModuleTask
from l2l_lightning.data import DataCorruptedError, DataNotFoundError, load_text
from l2l_lightning.rollout.optimizees import check_evaluable

TEXT = "abcab\ncab ä" * 10 + "xab\nca" * 2 + "ü"
"""123 characters, of which x and ü come after the first 80%."""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_characters_are_numbered_as_the_training_part_has_them(path):
    splits = load_text(path, length=5)
    parts = [TEXT[:98], TEXT[98:110], TEXT[110:]]
    vocabulary = "".join(sorted(set(parts[0])))
    assert vocabulary == "\n abcä"
    for split, part in zip(splits, parts, strict=True):
        assert split.symbols.tolist() == [1 + vocabulary.find(character) for character in part]
        assert (split.vocabulary, split.num_classes, len(split)) == (vocabulary, 7, len(part) - 5)
        assert split.source == splits.train.source
    assert "123 characters, 6 different ones in its training part; 3 others" in splits.train.source


def test_bytes_are_what_they_are(path):
    splits, content = load_text(path, length=3, symbols="bytes"), TEXT.encode()
    assert bytes(torch.cat([split.symbols for split in splits]).tolist()) == content
    assert {split.num_classes for split in splits} == {256}
    path.write_bytes(bytes(range(256)))
    assert load_text(path, length=3, symbols="bytes").test.symbols.tolist() == list(range(230, 256))


@pytest.mark.parametrize("symbols", ["characters", "bytes"])
def test_a_window_is_followed_by_what_it_is_to_predict(path, symbols):
    text = load_text(path, length=5, symbols=symbols).train
    indices = torch.tensor([[0, 7], [len(text) - 1, 7]])
    inputs, targets = text.to("cpu").gather(indices)
    for place in [(0, 0), (0, 1), (1, 0)]:
        start = int(indices[place])
        assert inputs[place].tolist() == text.symbols[start : start + 5].tolist()
        assert targets[place].tolist() == text.symbols[start + 1 : start + 6].tolist()
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)


def test_a_text_that_cannot_be_used_is_an_error_of_one_line(path, tmp_path):
    with pytest.raises(DataNotFoundError, match=r"absent cannot be read \(--data\.text\)"):
        load_text(tmp_path / "absent")
    with pytest.raises(DataCorruptedError, match=r"too short.*need 14 characters.*text_length 13\).* has 12"):
        load_text(path, length=13)
    with pytest.raises(ValueError, match="text_symbols must be one of characters, bytes"):
        load_text(path, symbols="words")
    path.write_bytes(b"abc\xff" * 50)
    with pytest.raises(DataCorruptedError, match=r"not UTF-8 at byte 3: --data\.text_symbols bytes"):
        load_text(path)
    with pytest.raises(ValueError, match="text and train are two data sets"):
        MetaData(text=str(path), train=(torch.ones(6, 1), torch.ones(6)))


class Bigrams(nn.Module):
    """Logits of the next symbol by the last one."""

    def __init__(self, symbols=7):
        super().__init__()
        self.table = nn.Embedding(symbols, symbols)

    def forward(self, symbols):
        return self.table(symbols)


def next_symbol(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_a_module_learns_the_next_symbol_of_a_text(path):
    data = MetaData(text=str(path), text_length=5)
    task = ModuleTask(Bigrams, next_symbol, batch_size=3)
    data.load(task)
    check_evaluable(task, data.images("validation", "cpu"), seed=0)
    assert data.settings()["text"] == str(path)
    too_few = ModuleTask(lambda: Bigrams(3), next_symbol, batch_size=3)
    # The number of symbols is in the message, and in the examples for whoever builds the module.
    with pytest.raises(ValueError, match=r"cannot be evaluated: .*6 different ones"):
        check_evaluable(too_few, data.images("validation", "cpu"), seed=0)

"""Rows of their own length in one cache, against attention over each row alone."""

import copy

import pytest
import torch
from transformers import DynamicCache

from transformers_sled import SledConfig
from transformers_sled.cache_sled import CACHE_ARGUMENT, NUM_HIDDEN, SledCache, get_fixed_capacity
from transformers_sled.modeling_sled import SledModel


CONFIG = SledConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="eager",
)


def make_model(dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> SledModel:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config._attn_implementation = attn_implementation
    return SledModel(config).eval().to(dtype)


def read_alone(model: SledModel, inputs: torch.Tensor) -> torch.Tensor:
    """Hidden states of a row in one pass without a cache."""
    with torch.no_grad():
        return model(inputs_embeds=inputs[None].to(model.dtype), use_cache=False).last_hidden_state[0].float()


class Reader:
    """Reads rows step by step through one cache, as the engine does."""

    def __init__(self, model: SledModel, capacity: int | None = None):
        self.model = model
        self.cache = SledCache(model.config.num_hidden_layers, capacity)
        self.lengths: dict[int, int] = {}

    def read(self, inputs: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        rows = torch.tensor(list(inputs))
        padded = torch.nn.utils.rnn.pad_sequence(list(inputs.values()), batch_first=True).to(self.model.dtype)
        lengths = torch.tensor([self.lengths.get(row, 0) for row in inputs])
        positions = lengths[:, None] + torch.arange(padded.shape[1])
        room = max([*self.lengths, *inputs]) + 1, int(lengths.max()) + padded.shape[1]
        mask = None
        if not lengths.any():
            self.cache.start(rows[:, None], positions, *room)
        else:
            are_first_rows = rows.tolist() == list(range(len(rows)))
            num_visible = self.cache.select(rows, positions, *room, are_first_rows=are_first_rows)
            is_ahead = torch.arange(num_visible) > positions[:, None, :, None]
            mask = torch.zeros(is_ahead.shape).masked_fill(is_ahead, torch.finfo(torch.float32).min)
        with torch.no_grad():
            outputs = self.model(
                inputs_embeds=padded,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{CACHE_ARGUMENT: self.cache},
            )
        for row, sequence in inputs.items():
            self.lengths[row] = self.lengths.get(row, 0) + len(sequence)
        return {
            row: outputs.last_hidden_state[index, : len(sequence)].float()
            for index, (row, sequence) in enumerate(inputs.items())
        }


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("capacity", [None, 256])
def test_rows_read_what_each_reads_alone(attn_implementation, capacity):
    model = make_model(attn_implementation=attn_implementation)
    inputs = torch.randn(3, 120, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    reader = Reader(model, capacity)
    read: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    # Starting together and later, going on with one position or several, sitting out, and growing twice.
    for portions in ({0: 7, 1: 2}, {0: 1, 1: 1}, {2: 60}, {0: 1, 1: 1, 2: 1}, {1: 5, 2: 3}, {2: 40}, {0: 90, 1: 30}):
        step = {}
        for row, length in portions.items():
            start = reader.lengths.get(row, 0)
            step[row] = inputs[row, start : start + length]
        for row, states in reader.read(step).items():
            read[row].append(states)
    for row, states in read.items():
        length = reader.lengths[row]
        torch.testing.assert_close(torch.cat(states), read_alone(model, inputs[row, :length]), atol=1e-5, rtol=0)
    if capacity is not None:
        assert all(layer.keys.shape[1] == capacity + NUM_HIDDEN for layer in reader.cache.layers)


def test_a_row_that_moves_goes_on():
    model = make_model()
    inputs = torch.randn(3, 9, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    reader = Reader(model)
    reader.read({0: inputs[0, :4], 1: inputs[1, :3], 2: inputs[2, :5]})
    reader.cache.move_row(2, 0, 5)
    reader.lengths[0] = 5
    states = reader.read({0: inputs[2, 5:], 1: inputs[1, 3:]})
    torch.testing.assert_close(states[0], read_alone(model, inputs[2])[5:], atol=1e-5, rtol=0)
    torch.testing.assert_close(states[1], read_alone(model, inputs[1])[3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu_attends_in_float32(dtype):
    model = make_model(dtype)
    inputs = torch.randn(2, 20, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = [read_alone(make_model(), row) for row in inputs]
    reader = Reader(model)
    states = [reader.read({0: inputs[0, :15], 1: inputs[1, :9]})]
    states += [reader.read({0: inputs[0, [15 + step]], 1: inputs[1, [9 + step]]}) for step in range(5)]
    assert all(layer.keys.dtype == layer.values.dtype == torch.float32 for layer in reader.cache.layers)
    for row in (0, 1):
        actual = torch.cat([step[row] for step in states])
        difference = actual - expected[row][: len(actual)]
        assert difference.norm() / expected[row].norm() < 0.03
    # The base class's own caches work as well.
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        for portion in (inputs[:1, :15], inputs[:1, 15:16]):
            outputs = model(inputs_embeds=portion.to(dtype), use_cache=True, **{CACHE_ARGUMENT: cache})
    assert (outputs.last_hidden_state[0, -1].float() - expected[0][15]).norm() / expected[0][15].norm() < 0.03


def test_fixed_capacities_are_few():
    assert [get_fixed_capacity(number) for number in (1, 256, 257, 2048)] == [256, 256, 512, 2048]

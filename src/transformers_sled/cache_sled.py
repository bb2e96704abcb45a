"""Keys and values in rows of their own length, growing or of fixed capacity."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaAttention

from .configuration_sled import SledConfig


# transformers 5.24 renamed the argument of the decoder, its layers and their attention.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"

# Positions that a growing cache makes room for at least when it is full. No width of a head, which the compiler would take
# for the same size.
MIN_GROWTH = 96

# Positions that there is room for and that are never shown. The compiler has a case of its own for what is shown whole.
NUM_HIDDEN = 1


@dataclass
class SledCachePlaces:
    """
    Where the next forward pass writes its keys and values, and what it sees.

    Args:
        num_rows (`int`, *optional*, defaults to 0):
            Rows that there is room for.
        num_positions (`int`, *optional*, defaults to 0):
            Positions that every row has room for.
        num_past_positions (`int`, *optional*, defaults to 0):
            Positions that the longest row holds already.
        num_visible_positions (`int`, *optional*, defaults to 0):
            Positions that are shown.
        index (`torch.LongTensor` of shape `(num_new_positions,)`, *optional*):
            Places of the new keys and values, counted over all rows.
        rows (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            The rows that are shown. By default the new keys and values are all there is to see.
        are_first_rows (`bool`, *optional*, defaults to `False`):
            Whether `rows` are 0, 1, 2 and so on, which need no copy.
    """

    num_rows: int = 0
    num_positions: int = 0
    num_past_positions: int = 0
    num_visible_positions: int = 0
    index: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    rows: torch.Tensor | None = None
    are_first_rows: bool = False


class SledCacheLayer(CacheLayerMixin):
    """Keys and values `(row, position, head, head_dim)` of one layer, where [`SledCache`] says."""

    is_compileable = True
    is_sliding = False
    is_initialized: bool

    def __init__(self, places: SledCachePlaces) -> None:
        super().__init__()
        self.places = places

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.make_room(key_states.shape[1], key_states.shape[3], key_states.dtype, key_states.device)

    def make_room(self, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """
        Makes room for what the next forward pass writes.

        Args:
            num_heads (`int`):
                Number of heads.
            head_dim (`int`):
                Their width.
            dtype (`torch.dtype`):
                Type of keys and values.
            device (`torch.device`):
                Their device.
        """
        if not self.is_initialized:
            shape = (self.places.num_rows, self.places.num_positions, num_heads, head_dim)
            # Zeros, because what is masked must at least be finite.
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros_like(self.keys)
            self.dtype, self.device = dtype, device
            self.is_initialized = True
        num_rows, num_positions = self.keys.shape[:2]
        if num_rows < self.places.num_rows or num_positions < self.places.num_positions:
            growth = (0, 0, 0, 0, 0, self.places.num_positions - num_positions, 0, self.places.num_rows - num_rows)
            self.keys = torch.nn.functional.pad(self.keys, growth)
            self.values = torch.nn.functional.pad(self.values, growth)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.lazy_initialization(key_states, value_states)
        return self._store(self.keys, key_states), self._store(self.values, value_states)

    def _store(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        places = self.places
        # A layer may be on another device than the first.
        index = places.index.to(stored.device)
        store(stored, index, states)
        if places.rows is None:
            return states
        rows = stored[: len(places.rows)] if places.are_first_rows else stored[places.rows.to(stored.device)]
        return rows[:, : places.num_visible_positions].transpose(1, 2)

    def move_row(self, source: int, target: int, length: int) -> None:
        """
        Copies the first positions of a row to another.

        Args:
            source (`int`):
                The row to copy.
            target (`int`):
                The row to overwrite.
            length (`int`):
                Number of positions.
        """
        if self.is_initialized:
            for stored in (self.keys, self.values):
                stored[target, :length] = stored[source, :length]

    def get_seq_length(self) -> int:
        return self.places.num_past_positions

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.num_visible_positions, 0


class SledCache(Cache):
    """
    Key and value cache whose rows are filled to lengths of their own. Before each forward pass [`~SledCache.select`] or
    [`~SledCache.start`] says which rows and positions it writes.

    Args:
        num_layers (`int`):
            Number of layers of the decoder.
        capacity (`int`, *optional*):
            Positions that every row has room for from the start, so that shapes stay what they are. By default the cache
            grows with what it holds.
    """

    def __init__(self, num_layers: int, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.places = SledCachePlaces(num_positions=capacity + NUM_HIDDEN if capacity else 0)
        super().__init__(layers=[SledCacheLayer(self.places) for _ in range(num_layers)])

    def select(
        self,
        rows: torch.Tensor,
        positions: torch.Tensor,
        num_rows: int,
        num_positions: int,
        are_first_rows: bool = False,
    ) -> int:
        """
        Chooses rows that go on.

        Args:
            rows (`torch.LongTensor` of shape `(batch_size,)`):
                Rows of the cache, one for each row of the batch.
            positions (`torch.LongTensor` of shape `(batch_size, num_new_positions)`):
                Positions in these rows.
            num_rows (`int`):
                Number of rows that the cache must have room for.
            num_positions (`int`):
                Number of positions that the longest row has afterwards. A cache of fixed capacity shows all of that.
            are_first_rows (`bool`, *optional*, defaults to `False`):
                Whether `rows` are 0, 1, 2 and so on, which need no copy.

        Returns:
            `int`: the number of positions that the forward pass sees.
        """
        places = self.places
        self._make_room(num_rows, num_positions)
        places.index = (rows[:, None] * places.num_positions + positions).flatten()
        places.rows, places.are_first_rows = rows, are_first_rows
        places.num_past_positions = num_positions - positions.shape[1]
        places.num_visible_positions = self.capacity or num_positions
        return places.num_visible_positions

    def get_first_rows(
        self, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, int]:
        """
        What the next forward pass needs to write and see, where [`~SledCache.select`] chose the first rows.

        Args:
            num_heads (`int`):
                Number of heads.
            head_dim (`int`):
                Their width.
            dtype (`torch.dtype`):
                Type of keys and values.

        Returns:
            `tuple(list[tuple(torch.FloatTensor, torch.FloatTensor)], torch.LongTensor, int)`: of each layer keys and values
            `(num_rows, num_positions, num_heads, head_dim)`, the places of new ones, counted over all rows, and the number
            of positions that are seen.
        """
        places = self.places
        for layer in self.layers:
            layer.make_room(num_heads, head_dim, dtype, places.index.device)
        return [(layer.keys, layer.values) for layer in self.layers], places.index, places.num_visible_positions

    def start(self, rows: torch.Tensor, positions: torch.Tensor, num_rows: int, num_positions: int) -> None:
        """
        Chooses rows that are empty, whose new keys and values are all that the forward pass sees.

        Args:
            rows (`torch.LongTensor` of the shape of `positions`, or one that fits it):
                Row of the cache of every input.
            positions (`torch.LongTensor` of shape `(batch_size, num_new_positions)`):
                Its position in that row.
            num_rows (`int`):
                Number of rows that the cache must have room for.
            num_positions (`int`):
                Number of positions that the longest row has afterwards.
        """
        places = self.places
        self._make_room(num_rows, num_positions)
        places.index = (rows * places.num_positions + positions).flatten()
        places.rows, places.are_first_rows = None, False
        places.num_past_positions, places.num_visible_positions = 0, positions.shape[1]

    def _make_room(self, num_rows: int, num_positions: int) -> None:
        places = self.places
        places.num_rows = max(places.num_rows, num_rows)
        missing = num_positions + NUM_HIDDEN - places.num_positions
        if missing > 0:
            places.num_positions += max(missing, MIN_GROWTH, places.num_positions // 2)

    def move_row(self, source: int, target: int, length: int) -> None:
        """
        Copies the first positions of a row to another.

        Args:
            source (`int`):
                The row to copy.
            target (`int`):
                The row to overwrite.
            length (`int`):
                Number of positions.
        """
        if length > 0:
            for layer in self.layers:
                layer.move_row(source, target, length)


def store(stored: torch.Tensor, index: torch.Tensor, states: torch.Tensor) -> None:
    """
    Writes keys or values to their places.

    Args:
        stored (`torch.FloatTensor` of shape `(num_rows, num_positions, num_heads, head_dim)`):
            Where to.
        index (`torch.LongTensor` of shape `(batch_size * length,)`):
            Their places, counted over all rows.
        states (`torch.FloatTensor` of shape `(batch_size, num_heads, length, head_dim)`):
            The keys or values.
    """
    stored.flatten(0, 1).index_copy_(0, index, states.transpose(1, 2).flatten(0, 1).to(stored.dtype))


def attends_in_float32(config: SledConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """
    Whether attention over the cache, and so the cache, is in float32: PyTorch's attention for half precision on CPU is
    slower, and sets itself up anew at every length.

    Args:
        config ([`SledConfig`]):
            The model's configuration.
        device (`torch.device`):
            Device of the hidden states.
        dtype (`torch.dtype`):
            Their type.

    Returns:
        `bool`: `True` for half precision on a CPU with `sdpa` attention.
    """
    is_half = dtype in (torch.bfloat16, torch.float16)
    return is_half and device.type == "cpu" and config._attn_implementation == "sdpa"


def get_fixed_capacity(num_positions: int) -> int:
    """
    Rounds a number of positions up, so that a compiled step meets only a few sizes.

    Args:
        num_positions (`int`):
            Positions that a row needs.

    Returns:
        `int`: the next multiple of 256.
    """
    return math.ceil(num_positions / 256) * 256


__all__ = ["CACHE_ARGUMENT", "SledCache", "SledCacheLayer", "attends_in_float32", "get_fixed_capacity"]

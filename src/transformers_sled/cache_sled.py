"""Keys and values in rows of their own length, growing or of fixed capacity."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaAttention


# transformers 5.24 renamed the argument of the decoder, its layers and their attention.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"

# Positions that a growing cache makes room for at least when it is full.
MIN_GROWTH = 64


@dataclass
class SledCachePlaces:
    """
    Where the next forward pass writes its keys and values, and what it sees.

    Args:
        capacity (`int`, *optional*):
            Positions that every row has room for from the start. By default rows grow.
        num_rows (`int`, *optional*, defaults to 0):
            Number of rows that there must be room for.
        num_positions (`int`, *optional*, defaults to 0):
            Number of positions that there must be room for.
        num_past_positions (`int`, *optional*, defaults to 0):
            Number of positions that the longest row holds already.
        num_visible_positions (`int`, *optional*, defaults to 0):
            Number of positions that are shown.
        rows (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Rows of the cache.
        positions (`torch.LongTensor` of shape `(batch_size, num_new_positions)`, *optional*):
            Positions in these rows.
        are_first_rows (`bool`, *optional*, defaults to `False`):
            Whether `rows` are 0, 1, 2 and so on, which need no copy.
        starts_rows (`bool`, *optional*, defaults to `False`):
            Whether the rows are empty, so that the new keys and values are all there is to see.
    """

    capacity: int | None = None
    num_rows: int = 0
    num_positions: int = 0
    num_past_positions: int = 0
    num_visible_positions: int = 0
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    are_first_rows: bool = False
    starts_rows: bool = False


class SledCacheLayer(CacheLayerMixin):
    """Keys and values `(row, head, position, head_dim)` of one layer, where [`SledCache`] says."""

    is_compileable = True
    is_sliding = False

    def __init__(self, places: SledCachePlaces) -> None:
        super().__init__()
        self.places = places

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        _, num_heads, _, head_dim = key_states.shape
        # Zeros, because what is masked must at least be finite.
        self.keys = key_states.new_zeros(0, num_heads, self.places.capacity or 0, head_dim)
        self.values = value_states.new_zeros(0, num_heads, self.places.capacity or 0, head_dim)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.places.num_rows > self.keys.shape[0] or self.places.num_positions > self.keys.shape[2]:
            self.keys, self.values = self._grow(self.keys), self._grow(self.values)
        return self._store(self.keys, key_states), self._store(self.values, value_states)

    def _grow(self, stored: torch.Tensor) -> torch.Tensor:
        num_rows, _, length, _ = stored.shape
        missing = self.places.num_positions - length
        growth = max(missing, MIN_GROWTH, length // 2) if missing > 0 else 0
        return torch.nn.functional.pad(stored, (0, 0, 0, growth, 0, 0, 0, self.places.num_rows - num_rows))

    def _store(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        places = self.places
        stored[places.rows[:, None], :, places.positions] = states.transpose(1, 2)
        if places.starts_rows:
            return states
        filled = stored[:, :, : places.num_visible_positions]
        return filled[: len(places.rows)] if places.are_first_rows else filled[places.rows]

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
                stored[target, :, :length] = stored[source, :, :length]

    def get_seq_length(self) -> int:
        return self.places.num_past_positions

    def get_max_length(self) -> int:
        return self.places.capacity or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.num_visible_positions, 0


class SledCache(Cache):
    """
    Key and value cache whose rows are filled to lengths of their own. Before each forward pass,
    [`~SledCache.select`] says which rows and positions it writes.

    Args:
        num_layers (`int`):
            Number of layers of the decoder.
        capacity (`int`, *optional*):
            Positions that every row has room for from the start, so that shapes stay what they are. By default the cache
            grows with what it holds.
    """

    def __init__(self, num_layers: int, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.places = SledCachePlaces(capacity, num_positions=capacity or 0)
        super().__init__(layers=[SledCacheLayer(self.places) for _ in range(num_layers)])

    def select(
        self,
        rows: torch.Tensor,
        positions: torch.Tensor,
        num_rows: int,
        num_positions: int,
        are_first_rows: bool = False,
        starts_rows: bool = False,
    ) -> int:
        """
        Chooses where the next forward pass writes its keys and values.

        Args:
            rows (`torch.LongTensor` of shape `(batch_size,)`):
                Rows of the cache.
            positions (`torch.LongTensor` of shape `(batch_size, num_new_positions)`):
                Positions in these rows.
            num_rows (`int`):
                Number of rows that the cache must have room for.
            num_positions (`int`):
                Number of positions that the longest row has afterwards. A cache of fixed capacity shows all it has.
            are_first_rows (`bool`, *optional*, defaults to `False`):
                Whether `rows` are 0, 1, 2 and so on, which need no copy.
            starts_rows (`bool`, *optional*, defaults to `False`):
                Whether the rows are empty, so that the new keys and values are all there is to see.

        Returns:
            `int`: the number of positions that the forward pass sees.
        """
        places = self.places
        places.rows, places.positions = rows, positions
        places.num_rows = max(places.num_rows, num_rows)
        places.num_positions = self.capacity or num_positions
        places.num_past_positions = num_positions - positions.shape[1]
        places.num_visible_positions = num_positions if starts_rows else places.num_positions
        places.are_first_rows, places.starts_rows = are_first_rows, starts_rows
        return places.num_visible_positions

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


__all__ = ["CACHE_ARGUMENT", "SledCache", "SledCacheLayer", "get_fixed_capacity"]

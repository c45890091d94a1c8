"""Which keys and queries each program of the Hopper kernel takes, and in which order (Gluon).

A program takes whole tiles of queries, one in every round. Tiles that do not fill a last round are divided among all
programs along their keys ("stream-K"); `attention_merge` puts the parts together.

Key tiles are counted through the slots of one or two segments. Of every slot the tile that is not full comes first, so
that one branch masks it and changes the unit of the accumulator: an e4m3 slot, padded to whole tiles, is read from its
end; a 2-byte slot from before its start, where TMA gives zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

KEYS = gl.constexpr(128)
"""Keys of a tile."""


@gluon.jit
def segment_slots(length_ptr, layout):
    """Valid rows of a segment, the slots that they fill, and their key tiles."""
    count, rows = layout[0], layout[1]
    length = gl.to_tensor(count) * rows
    if length_ptr is not None:
        length = gl.minimum(gl.load(length_ptr).to(gl.int32), length)
    tiles = length // rows * gl.cdiv(rows, KEYS) + gl.cdiv(length % rows, KEYS)
    return length, gl.cdiv(length, rows), tiles


@gluon.jit
def slot_tiles(slot, slots_0, length_0, length_1, layout_0, layout_1):
    """Valid rows and key tiles of a slot, counted through both segments; a call without keys sees one masked tile."""
    if slot < slots_0:
        valid = gl.minimum(length_0 - slot * layout_0[1], layout_0[1])
    else:
        valid = gl.minimum(length_1 - (slot - slots_0) * layout_1[1], layout_1[1])
    valid = gl.maximum(valid, 0)
    return valid, gl.maximum(gl.cdiv(valid, KEYS), 1)


@gluon.jit
def find_tile(index, slots_0, length_0, length_1, layout_0, layout_1):
    """Slot of a key tile, the slot's valid rows and key tiles, and how many of these are left from this one on."""
    slot = 0
    valid, count = slot_tiles(slot, slots_0, length_0, length_1, layout_0, layout_1)
    while index >= count:
        index -= count
        slot += 1
        valid, count = slot_tiles(slot, slots_0, length_0, length_1, layout_0, layout_1)
    return slot, valid, count, count - index


@gluon.jit
def find_work(item, rounds, tiles, key_tiles):
    """The query tile of a program's item of work, and its first and last key tile.

    After `rounds` whole tiles come two parts of the tiles that remain: in units of one tile over the number of
    programs, program p has those from p * rest to (p + 1) * rest, which touch two tiles at most.
    """
    programs, p = gl.num_programs(0), gl.program_id(0)
    tile, begin, end = item * programs + p, 0, key_tiles
    if item >= rounds:
        rest = tiles % programs
        first = p * rest // programs
        stop = (p + 1) * rest - first * programs  # in units from the start of the first tile
        tile = rounds * programs + first
        if item == rounds:
            begin = (p * rest - first * programs) * key_tiles // programs
            end = gl.minimum(stop, programs) * key_tiles // programs
        else:
            tile += 1
            end = (stop - programs) * key_tiles // programs
    return tile, begin, end


@gluon.jit
def count_work(tiles):
    """Whole tiles of a program, and its items of work."""
    programs, p = gl.num_programs(0), gl.program_id(0)
    rounds, rest = tiles // programs, tiles % programs
    items = rounds
    if rest > 0:
        items += 1
        if (p + 1) * rest > (p * rest // programs + 1) * programs:
            items += 1
    return rounds, items

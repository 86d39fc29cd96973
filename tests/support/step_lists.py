"""A packed step in plain lists, made anew from the rows' tables: what `prepare_inputs` must say."""

from itertools import accumulate


def assert_describes(inputs, chunks, groups, num_pads=0):
    """Check every number of a step, whose last rows pad it. Groups have one layer each, of their number."""
    lengths = [chunk.end - chunk.start for chunk in chunks] + [1] * num_pads
    ends = list(accumulate(lengths))
    pads = [0] * num_pads
    tokens = [token for chunk in chunks for token in chunk.request.tokens[chunk.start : chunk.end]]
    positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
    assert inputs.input_ids.tolist() == [tokens + pads]
    assert inputs.position_ids.tolist() == [positions + pads]
    is_sampled = [chunk.samples for chunk in chunks] + [True] * num_pads
    assert inputs.sample_index.tolist() == [end - 1 for end, samples in zip(ends, is_sampled) if samples]
    assert list(inputs.layers) == list(range(len(groups)))
    for number, group in enumerate(groups):
        metadata, tables = inputs.layers[number][1], [chunk.request.tables[number] for chunk in chunks]
        assert metadata.window == group.window
        assert metadata.cu_seqlens_q.tolist() == [0, *ends]
        slots = [slot for chunk, table in zip(chunks, tables) for slot in table.slots(chunk.start, chunk.end)]
        assert metadata.slot_mapping.tolist() == slots + [-1] * num_pads
        assert metadata.context_lens.tolist() == [chunk.end - t.base for chunk, t in zip(chunks, tables)] + pads
        width = metadata.block_tables.shape[1]
        assert num_pads or width == max(len(table.blocks) for table in tables)
        rows = metadata.block_tables[: len(chunks)].tolist()
        assert rows == [table.blocks + [0] * (width - len(table.blocks)) for table in tables]

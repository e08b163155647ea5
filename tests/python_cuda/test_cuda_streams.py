"""Work goes to the stream it should go to, nothing waits, and all of it can be captured in a graph."""

import threading

import pytest
import torch

import gquant
import gquant.torch
from weights import DTYPES, equal, normal

BUSY = 200_000_000  # cycles: about a tenth of a second


def quantized(seed=1, nested=True, dtype=torch.bfloat16, shape=(512, 512)):
    return gquant.torch.quantize_4bit(normal(*shape, dtype=dtype, seed=seed).cuda(), 64, nested)


class no_waiting:
    """torch raises an error when it would wait for the device."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *exception):
        torch.cuda.set_sync_debug_mode("default")


def results(x):
    """Everything that is put on a stream, from one source."""
    packed, state = gquant.torch.quantize_4bit(x, 64, True)
    fp4, fp4_state = gquant.torch.quantize_4bit(x, 128, False, "fp4")
    codes, absmax = gquant.quantize_blockwise(x)
    rows, scales, outliers = gquant.quantize_rows_int8(x, 2.0)
    int8 = gquant.quantize(x, "int8")
    decoded = (
        gquant.torch.dequantize_4bit(packed, state),
        gquant.torch.dequantize_4bit(fp4, fp4_state),
        gquant.dequantize_blockwise(codes, absmax),
        int8.dequantize(),
    )
    halves = gquant.pack_4bit(codes & 15)
    parts = (state.absmax, state.state2.absmax, state.state2.code, state.offset, state.code, fp4_state.absmax)
    return packed, *parts, fp4, codes, absmax, rows, scales, outliers, *decoded, halves, gquant.unpack_4bit(halves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits(dtype):
    """Each call returns while the stream is still busy with what came before."""
    x = normal(96, 512, dtype=dtype).cuda()
    want = results(x)
    later = torch.zeros_like(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), no_waiting():
        torch.cuda._sleep(BUSY)
        later.copy_(x)
        found = results(later)
        assert not side.query(), "it waited"
    side.synchronize()
    for number, (ours, theirs) in enumerate(zip(found, want, strict=True)):
        assert equal(ours, theirs), number


def test_plain_functions_take_a_stream():
    x = normal(96, 512).cuda()
    want = gquant.quantize(x, nested=True)
    later = torch.zeros_like(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY)
        later.copy_(x)
    stream = side.cuda_stream
    state = gquant.quantize(later, nested=True, stream=stream)
    decoded = state.dequantize(stream=stream)
    codes, absmax = gquant.quantize_blockwise(later, stream=stream)
    restored = gquant.dequantize_blockwise(codes, absmax, stream=stream)
    rows, scales, _ = gquant.quantize_rows_int8(later, stream=stream)
    unpacked = gquant.unpack_4bit(gquant.pack_4bit(codes & 0, stream=stream), stream=stream)
    assert not side.query(), "it waited"
    side.synchronize()
    assert equal(state.packed, want.packed) and equal(state.absmax, want.absmax) and equal(decoded, want.dequantize())
    assert equal(restored, gquant.dequantize_blockwise(*gquant.quantize_blockwise(x)))
    plain = gquant.quantize_rows_int8(x)
    assert equal(rows, plain[0]) and equal(scales, plain[1]) and not unpacked.any()


def test_many_streams_and_threads():
    sources = [normal(256, 256, seed=seed).cuda() for seed in range(8)]
    wanted = [[t.cpu() for t in results(x)] for x in sources]
    wrong = []

    def work(number):
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(20):
                    found = results(sources[number])
                    stream.synchronize()
                    if not all(equal(a, b) for a, b in zip(found, wanted[number], strict=True)):
                        wrong.append(number)
        except Exception as e:
            wrong.append(e)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph(dtype, nested):
    """A captured graph computes anew from what the source holds when it is replayed."""
    x = torch.zeros(96, 512, dtype=dtype, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed, state = gquant.torch.quantize_4bit(x, 64, nested)
        decoded = gquant.torch.dequantize_4bit(packed, state)
        codes, absmax = gquant.quantize_blockwise(x)
        restored = gquant.dequantize_blockwise(codes, absmax)
        rows = gquant.quantize_rows_int8(x, 2.0)
    for seed in (1, 2):
        x.copy_(normal(96, 512, dtype=dtype, seed=seed))
        graph.replay()
        want, wanted = gquant.torch.quantize_4bit(x, 64, nested)
        assert equal(packed, want) and equal(state.absmax, wanted.absmax) and equal(state.code, wanted.code)
        assert equal(decoded, gquant.torch.dequantize_4bit(want, wanted))
        if nested:
            assert equal(state.offset, wanted.offset) and equal(state.state2.absmax, wanted.state2.absmax)
            assert equal(state.state2.code, wanted.state2.code)
        assert equal(restored, gquant.dequantize_blockwise(*gquant.quantize_blockwise(x)))
        for ours, theirs in zip(rows, gquant.quantize_rows_int8(x, 2.0), strict=True):
            assert equal(ours, theirs)


def test_memory_that_is_used_again():
    """New tensors often lie where old ones lay; what is remembered of those must fit them."""
    for step in range(300):
        shape = [(64, 64), (32, 128), (64, 32)][step % 3]
        dtype, nested = DTYPES[step % 2], step % 5 == 0
        x = normal(*shape, dtype=dtype, seed=step)
        packed, state = gquant.torch.quantize_4bit(x.cuda(), 64, nested)
        want = gquant.torch.dequantize_4bit(*gquant.torch.quantize_4bit(x, 64, nested))
        assert equal(gquant.torch.dequantize_4bit(packed, state), want), step


def test_no_memory_is_left():
    packed, state = quantized()
    x = gquant.torch.dequantize_4bit(packed, state)
    plain = gquant.quantize(x, nested=True)

    def cycle(count):
        for _ in range(count):
            gquant.torch.quantize_4bit(x, 64, True)
            gquant.torch.dequantize_4bit(packed, state)
            plain.dequantize()
        torch.cuda.synchronize()

    cycle(50)
    before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    cycle(500)
    assert torch.cuda.memory_allocated() == before[0] and torch.cuda.mem_get_info()[0] >= before[1]

"""The arithmetic of attention: the project's figures, and counts made another way."""

import dataclasses
import itertools
import math

import pytest
from absl.testing import absltest, parameterized

from mla_jax import costs
from mla_jax.config import MLAConfig, presets

V3 = MLAConfig.from_preset("deepseek_v3")
H100, H200 = costs.device("h100"), costs.device("h200")
STEPS = tuple(  # batch, queries, slots: odd sizes on purpose
    (f"{preset}_{kind}_{batch}_{queries}_{slots}", preset, kind, batch, queries, slots)
    for preset in ("deepseek_v2_lite", "minicpm3", "glm_4_7_flash", "tiny")
    for kind in (*costs.KINDS, "gqa2")
    for batch, queries, slots in ((1, 1, 1), (3, 5, 77), (2, 129, 129))
)
# Every fifth has, together, each pair of two arguments' values.
INTERVALS = tuple(
    itertools.product(
        ("deepseek_v3", "deepseek_v2_lite", "tiny"), costs.PARTS, (1, 9), (1, 70), ("mha", "gqa")
    )
)
# MLA's einsums, and the same for the other kinds; L = R+P, K = H+P, G heads of keys.
MLA_QUERY = {"q_proj": ("BTD,DQ->BTQ", "BTQ,QNK->BTNK")}
MHA = {
    "q_proj": ("BTD,DNH->BTNH",),
    "kv_proj": ("BTD,DGH->BTGH", "BTD,DGV->BTGV"),
    "scores": ("BTNH,BSGH->BNTS",),
    "mixing": ("BNTS,BSGV->BTNV",),
    "o_proj": ("BTNV,NVD->BTD",),
}
EXPANDED = MLA_QUERY | {
    "kv_proj": ("BTD,DL->BTL",),
    "expand": ("BSR,RNH->BSNH", "BSR,RNV->BSNV"),
    "scores": ("BTNK,BSNK->BNTS",),
    "mixing": ("BNTS,BSNV->BTNV",),
    "o_proj": ("BTNV,NVD->BTD",),
}
ABSORBED = MLA_QUERY | {
    "kv_proj": ("BTD,DL->BTL",),
    "pattern": ("BTNH,RNH->BTNR",),
    "scores": ("BTNR,BSR->BNTS", "BTNP,BSP->BNTS"),
    "mixing": ("BNTS,BSR->BTNR",),
    "values": ("BTNR,RNV->BTNV",),
    "o_proj": ("BTNV,NVD->BTD",),
}
EXPANDED_CACHED = {name: einsums for name, einsums in EXPANDED.items() if name != "expand"}
EXPANDED_CACHED["kv_proj"] = ("BTD,DL->BTL", "BTR,RNH->BTNH", "BTR,RNV->BTNV")
EINSUMS = {"absorbed": ABSORBED, "expanded": EXPANDED, "expanded_cached": EXPANDED_CACHED}


def einsum_flops(config, einsum, batch, queries, slots, groups):
    """Two operations for every combination of an einsum's letters."""
    c = config
    letters = set(einsum) - set(",->")
    if "G" in letters and "N" in letters:
        letters.remove("G")  # each query head meets the one key head of its group
    size = {
        "B": batch, "T": queries, "S": slots, "N": c.num_attention_heads, "D": c.hidden_size,
        "Q": c.q_lora_rank, "R": c.kv_lora_rank, "H": c.qk_nope_head_dim, "P": c.qk_rope_head_dim,
        "V": c.v_head_dim, "K": c.qk_head_dim, "L": c.kv_lora_rank + c.qk_rope_head_dim,
        "G": groups,
    }  # fmt: skip
    return 2 * math.prod(size[letter] for letter in letters)


class FiguresTest(parameterized.TestCase):
    """The figures that the papers and the README state."""

    def test_numbers_read_per_context_token(self):
        latents = costs.numbers_read(V3, "absorbed")
        keys = V3.num_attention_heads * V3.qk_nope_head_dim
        assert (latents, keys) == (576, 16384)
        assert costs.numbers_read(V3, "mha") == 32768
        assert costs.numbers_read(V3, "expanded") == 40960
        assert costs.numbers_read(V3, "expanded_cached") == 40960
        assert costs.numbers_read(V3, "gqa") == 8 * 256
        assert costs.numbers_read(V3, "gqa16") == 16 * 256
        assert costs.numbers_read(V3, "mqa") == 256
        assert round(keys / latents, 2) == 28.44
        assert round(costs.numbers_read(V3, "mha") / latents, 1) == 56.9
        assert round(costs.numbers_read(V3, "expanded") / latents, 1) == 71.1

    def test_arithmetic(self):
        assert costs.multiply_adds(V3, "absorbed") == 1088
        assert costs.multiply_adds(V3, "absorbed") / costs.multiply_adds(V3, "mha") == 4.25
        assert costs.multiply_adds(V3, "absorbed") / costs.multiply_adds(V3, "expanded") == 3.40

    def test_cache_at_128k(self):
        assert costs.cache_bytes(V3, 1, 131072, "mha") == 488 * 2**30
        assert costs.cache_bytes(V3, 1, 131072) == 61 * 131072 * 576 * 2
        assert round(costs.cache_bytes(V3, 1, 131072) / 2**30, 1) == 8.6
        assert costs.cache_bytes(V3, 3, 5, "expanded", width=4, layers=7) == 3 * 5 * 7 * 576 * 4

    @parameterized.parameters(
        ("kimi_linear", 7), ("kimi_k3", 24), ("ling_3_flash", 7), ("longcat_flash", 2 * 28),
        ("longcat_flash_lite", 2 * 14), ("deepseek_v3", 61), ("tiny", 4),
    )  # fmt: skip
    def test_layers_with_mla_are_counted(self, preset, layers):
        config = MLAConfig.from_preset(preset)
        assert config.mla_layers == layers
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
        assert costs.cache_bytes(config, 3, 5) == 3 * 5 * layers * numbers * 2
        assert costs.cache_bytes(config, 3, 5, layers=1) == 3 * 5 * numbers * 2
        row = costs.table(config, H200, context=64, kinds=("absorbed",))[0]
        assert row.cache_bytes_per_token == layers * numbers * 2

    def test_a_token_of_kimi_linear_and_of_longcat(self):
        per_token = [
            costs.cache_bytes(MLAConfig.from_preset(name), 1, 1) / 2**10
            for name in ("kimi_linear", "longcat_flash")
        ]
        assert per_token == [7.875, 63.0]

    @parameterized.parameters("deepseek_v2_lite", "deepseek_v3", "kimi_k2_0711", "longcat_flash")
    def test_crossover_is_171_tokens(self, preset):
        config = MLAConfig.from_preset(preset)
        assert round(costs.crossover_queries(config, 10**9)) == 171
        assert costs.choose_form(config, 170, 10**9) == "absorbed"
        assert costs.choose_form(config, 171, 10**9) == "expanded"

    def test_ridges_and_intensities(self):
        assert (H100.flops_per_second, H100.bytes_per_second) == (989e12, 3.35e12)
        core = costs.decode_step(V3, 1, 1, 10**6).part("core")
        assert round(core.intensity) == 242  # 2 * 128 * 1088 / 1152
        assert (core.bound(H100), core.bound(H200)) == ("memory", "compute")
        mha = costs.decode_step(V3, 1, 1, 10**6, "mha").part("core")
        assert round(mha.intensity) == 1
        assert round(mha.seconds(H100) / core.seconds(H100), 1) == 56.9

    @pytest.mark.unchecked
    def test_when_mla_is_slower(self):
        assert round(costs.queries_until_slower(V3, H100), 2) == 69.46  # 295.22 / 4.25
        assert round(costs.queries_until_slower(V3, H200), 2) == 48.48
        for device in (H100, H200):
            assert costs.slower_contexts(V3, device, part="core") == [(1, 3)]
            assert costs.slower_contexts(V3, device, part="attention") == [(1, 529)]
            assert costs.slower_contexts(V3, device, 32, part="attention") == [(1, 24)]
            for batch in (1, 32, 4096):
                assert costs.slower_contexts(V3, device, batch) == []
        assert costs.slower_contexts(V3, H100, 1, 128) == [(9726, None)]
        assert costs.slower_contexts(V3, H200, 1, 128) == [(4997, None)]
        layers = (costs.decode_step(V3, 1, 1, 1, kind) for kind in ("absorbed", "mha"))
        weights = [sum(stage.weight_bytes for stage in layer.stages) for layer in layers]
        assert [round(w / 2e6) for w in weights] == [187, 470]


class StepTest(parameterized.TestCase):
    @parameterized.named_parameters(*STEPS)
    def test_operations_are_those_of_the_einsums(self, preset, kind, batch, queries, slots):
        config = MLAConfig.from_preset(preset)
        n = config.num_attention_heads
        groups = {"gqa": math.gcd(n, 8), "gqa2": 2, "mqa": 1}.get(kind, n)
        einsums = EINSUMS.get(kind, MHA)
        if config.q_lora_rank is None and kind in EINSUMS:
            einsums = einsums | {"q_proj": ("BTD,DNK->BTNK",)}
        step = costs.decode_step(config, batch, queries, slots, kind)
        assert {stage.name for stage in step.stages} == set(einsums)
        for name, strings in einsums.items():
            count = sum(
                einsum_flops(config, s, batch, queries, slots, groups) for s in strings
            )  # fmt: skip
            assert step[name].flops == count, name
        assert step.flops == sum(stage.flops for stage in step.stages)
        assert step.bytes == sum(stage.bytes for stage in step.stages)

    @parameterized.parameters(*costs.KINDS)
    def test_bytes(self, kind):
        config = MLAConfig.from_preset("tiny")
        b, t, s, c = 3, 2, 50, costs.cache_numbers(config, kind)
        step = costs.decode_step(config, b, t, s, kind)
        # The new tokens are written once and the context is read once, unless it is expanded.
        assert sum(stage.cache_bytes for stage in step.stages) == 2 * b * (t + s) * c
        weights = sum(stage.weight_bytes for stage in step.stages)
        n, d, q, r, h, p, v = 4, 128, 64, 64, 32, 16, 32
        if kind in ("absorbed", "expanded", "expanded_cached"):
            parameters = d * q + q * n * (h + p) + d * (r + p) + r * n * (h + v) + n * v * d
        else:
            groups = {"mha": 4, "gqa": 4, "mqa": 1}[kind]
            parameters = d * n * h + d * groups * (h + v) + n * v * d
        assert weights == 2 * parameters
        core = step.part("core")
        k, m = (r + p, r) if kind == "absorbed" else (h + p, v)
        k = h if kind in ("mha", "gqa", "mqa") else k
        moved = b * s * costs.numbers_read(config, kind) + b * t * n * (k + m)
        moved += (kind == "expanded") * b * s * (r + p + n * (h + p + v))  # latents in, heads out
        assert core.bytes == 2 * moved + (kind == "expanded") * 2 * r * n * (h + v)
        doubled = costs.decode_step(config, b, t, s, kind, width=4)
        assert (doubled.bytes, doubled.flops) == (2 * step.bytes, step.flops)

    def test_parts(self):
        step = costs.decode_step(V3, 2, 3, 100)
        assert [s.name for s in step.part("core").stages] == ["scores", "mixing"]
        assert step.part("attention").flops - step.part("core").flops == (
            step["pattern"].flops + step["values"].flops
        )
        assert step.part("layer") == step
        assert costs.decode_step(V3, 2, 3, 100, "expanded").part("core")["expand"].flops > 0

    @parameterized.parameters(*costs.KINDS)
    def test_costs_grow_with_every_size(self, kind):
        def measures(*sizes):
            step = costs.decode_step(V3, *sizes, kind)
            return step.flops, step.bytes, step.seconds(H100), step.part("core").seconds(H100)

        small = measures(2, 3, 500)
        for sizes in ((3, 3, 500), (2, 4, 500), (2, 3, 501)):
            assert all(a < b for a, b in zip(small, measures(*sizes), strict=True)), sizes

    @parameterized.parameters(*costs.KINDS)
    def test_seconds(self, kind):
        step = costs.decode_step(V3, 4, 1, 4096, kind)
        core = step.part("core")
        overlapped = max(step.flops / 989e12, step.bytes / 4.8e12)
        assert overlapped * (1 - 1e-12) <= step.seconds(H200) <= 2 * overlapped
        if kind != "expanded":  # which writes keys and values out before it attends
            bound = max(core.flops / 989e12, core.bytes / 4.8e12)
            assert core.seconds(H200) == pytest.approx(bound, rel=1e-12)
            rest = (s for s in step.stages if s.name not in ("scores", "mixing"))
            total = bound + sum(max(s.flops / 989e12, s.bytes / 4.8e12) for s in rest)
            assert step.seconds(H200) == pytest.approx(total, rel=1e-12)


class CrossoverTest(parameterized.TestCase):
    @parameterized.product(preset=presets(), slots=(1, 7, 500, 4096, 131072))
    def test_the_forms_cost_the_same_there(self, preset, slots):
        config = MLAConfig.from_preset(preset)
        queries = costs.crossover_queries(config, slots)
        attended = config.index_topk if config.is_sparse(slots) else slots

        def flops(kind, slots):  # operations are linear in the queries: reach between whole numbers
            one, two = (costs.decode_step(config, 1, t, slots, kind).flops for t in (1, 2))
            return one + (queries - 1) * (two - one)

        ratio = flops("absorbed", attended) / flops("expanded", slots)
        if attended < slots and queries == slots:  # a whole prompt is cheaper absorbed
            assert ratio <= 1
            return
        assert abs(ratio - 1) < 1e-9
        if attended < slots:
            return
        r, hv = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
        t0 = r * hv / (2 * r - hv)
        assert abs(queries * (1 / t0 + 1 / slots) - 1) < 1e-9

    @parameterized.product(preset=presets(), slots=(2, 100, 4096), queries=(1, 2, 60, 128, 400))
    def test_the_form_with_fewer_operations_is_chosen(self, preset, slots, queries):
        config = MLAConfig.from_preset(preset)
        attended = config.index_topk if config.is_sparse(slots) else slots
        absorbed, expanded = (
            costs.decode_step(config, 3, queries, count, kind).flops
            for kind, count in (("absorbed", attended), ("expanded", slots))
        )
        form = costs.choose_form(config, queries, slots)
        assert form == ("absorbed" if queries == 1 or absorbed <= expanded else "expanded")

    def test_narrow_latents_are_always_absorbed(self):
        for rank in (1, 16, 32):  # 2R <= H+V = 64
            config = MLAConfig.from_preset("tiny").replace(kv_lora_rank=rank)
            assert costs.crossover_queries(config, 1000) == 1000
            assert costs.choose_form(config, 1000, 1000) == "absorbed"

    @parameterized.parameters(*presets())
    def test_one_query_is_absorbed_and_a_whole_prompt_expanded(self, preset):
        config = MLAConfig.from_preset(preset)
        for slots in (1, 2, 3, 1000, 10**7):
            assert costs.choose_form(config, 1, slots) == "absorbed"
            several = slots > 1 or costs.crossover_queries(config, 1) < 2
            sparse = config.index_topk is not None and config.is_sparse(slots)
            assert costs.choose_form(config, max(2, slots), slots) == (
                "expanded" if several and not sparse else "absorbed"
            )


@pytest.mark.unchecked
class SlowerTest(parameterized.TestCase):
    @parameterized.parameters(*INTERVALS[::5])
    def test_intervals_hold(self, *case):
        self.check_intervals(*case)

    @parameterized.parameters(*(case for i, case in enumerate(INTERVALS) if i % 5))
    @pytest.mark.slow
    def test_intervals_hold_of_all_together(self, *case):
        self.check_intervals(*case)

    def check_intervals(self, preset, part, batch, queries, against):
        config = MLAConfig.from_preset(preset)
        found = costs.slower_contexts(config, H100, batch, queries, part, against)
        edges = {s + i for pair in found for s in pair if s is not None for i in (-1, 0, 1)}
        for slots in {*range(queries, 1300, 37), 10**5, 10**7, *edges}:
            if slots < queries:
                continue
            ours, theirs = (
                costs.decode_step(config, batch, queries, slots, kind).part(part).seconds(H100)
                for kind in ("absorbed", against)
            )
            inside = any(a <= slots and (b is None or slots <= b) for a, b in found)
            assert (ours > theirs) == inside, (slots, found)

    @parameterized.parameters(
        (config, device, against)
        for config in map(MLAConfig.from_preset, presets())
        for device in ("h100", "h200", "tpu_v6e")
        for against in ("mha", "gqa16", "gqa4", "expanded_cached")
        if against != "gqa16" or config.num_attention_heads % 16 == 0
    )
    def test_queries_until_slower(self, config, device, against):
        on = costs.device(device)
        limit = costs.queries_until_slower(config, on, against)

        def slower(queries):
            ours, theirs = (
                costs.decode_step(config, 1, queries, 10**9, kind).part("core").seconds(on)
                for kind in ("absorbed", against)
            )
            return ours > theirs

        assert slower(math.floor(limit) + 1)
        if limit >= 1:
            assert not slower(math.floor(limit))

    def test_limits_without_a_number(self):
        assert costs.queries_until_slower(V3, H100, "mqa") == 0
        narrow = V3.replace(kv_lora_rank=96)  # 2R+P = 256 = H+V
        assert costs.queries_until_slower(narrow, H100) == math.inf
        assert costs.compute_bound_queries(V3, H100, "mha") == H100.ridge


class DevicesAndTableTest(parameterized.TestCase):
    def test_devices(self):
        names = {
            "h200", "h100", "a100", "l4", "t4", "b200", "tpu_v5e", "tpu_v5p", "tpu_v6e", "tpu7x",
        }  # fmt: skip
        assert set(costs.devices()) == names
        for name in names:
            device = costs.device(name)
            assert device.name == name
            assert 100 < device.ridge < 700  # a slip of a prefix would show
            assert 15e9 < device.memory_bytes < 220e9

    def test_table(self):
        rows = costs.table(V3, H200, context=32768, batch=4)
        assert [row.kind for row in rows] == list(costs.KINDS)
        for row in rows:
            step = costs.decode_step(V3, 4, 1, 32768, row.kind)
            assert (row.layer, row.core) == (step, step.part("core"))
            assert row.cache_bytes == 4 * 32768 * row.cache_bytes_per_token
            assert row.cache_bytes_per_token == 61 * 2 * costs.cache_numbers(V3, row.kind)
            assert row.numbers_read == costs.numbers_read(V3, row.kind)
            assert row.fits == (row.cache_bytes <= 141e9)
            assert row.core_seconds == step.part("core").seconds(H200) < row.layer_seconds
        by_kind = {row.kind: row for row in rows}
        assert not by_kind["mha"].fits
        assert by_kind["absorbed"].fits
        assert [by_kind[kind].bound for kind in ("absorbed", "mha")] == ["compute", "memory"]
        assert [row.kind for row in costs.table(V3, H100, 9, kinds=("gqa4",))] == ["gqa4"]

    @parameterized.parameters(
        (lambda: costs.device("h20"), "device='h20'.*one of.*h200.*Did you mean 'h200'"),
        (lambda: costs.numbers_read(V3, "mla"), "kind='mla'.*absorbed"),
        (lambda: costs.numbers_read(V3, "gqa3"), "kind='gqa3'.*num_attention_heads=128"),
        (lambda: costs.numbers_read(V3, "gqa0"), "kind='gqa0'.*divide"),
        (lambda: costs.numbers_read(V3, "gqa-2"), "kind='gqa-2'"),
        (lambda: costs.numbers_read(V3, "8"), "kind='8'"),
        (lambda: costs.multiply_adds(V3, None), "kind=None"),
        (lambda: costs.cache_bytes(V3, 0, 1), "batch=0.*positive whole"),
        (lambda: costs.cache_bytes(V3, 1, 1.5), "length=1.5"),
        (lambda: costs.cache_bytes(V3, 1, 1, cache_dtype="fp8"), "cache_dtype='fp8'.*one of flo"),
        (lambda: costs.weight_bytes(1, weight_dtype="fp8"), "weight_dtype='fp8'.*one of flo"),
        (lambda: costs.cache_bytes(V3, 1, 1, layers=0), "layers=0"),
        (lambda: costs.cache_bytes(V3, 1, 1, width=-2), "width=-2"),
        (lambda: costs.decode_step(V3, 1, 0, 1), "queries=0"),
        (lambda: costs.table(V3, H100, context=0), "context=0"),
        (lambda: costs.table(V3, H100, context=9, batch=0), "batch=0"),
        (lambda: costs.decode_step(V3, 1, 1, True), "slots=True"),
        (lambda: costs.decode_step(V3, 1, 1, 1).part("cor"), "part='cor'.*Did you mean 'core'"),
        (lambda: costs.decode_step(V3, 1, 1, 1)["expand"], "stage='expand'.*pattern"),
        (lambda: costs.choose_form(V3, 0, 1), "queries=0"),
        (lambda: costs.choose_form(V3, 1, 0), "slots=0"),
        (lambda: costs.crossover_queries(V3, -1), "slots=-1"),
        (lambda: costs.slower_contexts(V3, H100, queries=0), "queries=0"),
        (lambda: costs.slower_contexts(V3, H100, part="all"), "part='all'"),
        (lambda: dataclasses.replace(H100, bytes_per_second=0), "bytes_per_second=0.*positive"),
        (lambda: dataclasses.replace(H100, memory_bytes="80"), "memory_bytes='80'"),
        (lambda: dataclasses.replace(H100, flops_per_second=math.nan), "flops_per_second=nan"),
    )
    def test_bad_input(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_sparse_step_scores_all_tokens_and_attends_to_the_chosen():
    v32 = MLAConfig.from_preset("deepseek_v32")
    step = costs.decode_step(v32, 2, 3, 10_000, "sparse")
    chosen = costs.decode_step(v32, 2, 3, 2048)
    assert step["index"].flops == 2 * 6 * 64 * 128 * 10_000
    assert step["index"].cache_bytes == 2 * 2 * 10_000 * 128  # once for a row's queries
    assert step["scores"].cache_bytes == 2 * 6 * 2048 * 576  # each query its own
    assert [step[name].flops for name in ("scores", "mixing", "o_proj")] == [
        chosen[name].flops for name in ("scores", "mixing", "o_proj")
    ]
    assert "index" not in [s.name for s in costs.decode_step(v32, 1, 1, 2048, "sparse").stages]
    assert costs.cache_numbers(v32, "sparse") == 576 + 128
    shared = v32.replace(indexer_type="shared")
    names = [stage.name for stage in costs.decode_step(shared, 2, 3, 10_000, "sparse").stages]
    assert "index_proj" not in names
    assert costs.cache_numbers(shared, "sparse") == 576
    with pytest.raises(ValueError, match="kind='sparse': index_topk is None"):
        costs.decode_step(MLAConfig.from_preset("deepseek_v3"), 1, 1, 8, "sparse")


class SmallNumbersTest(parameterized.TestCase):
    @parameterized.parameters("absorbed", "expanded")
    def test_latents_in_a_byte_a_number(self, kind):
        options = {"kind": kind, "cache_dtype": "float8_e4m3fn"}
        assert costs.cache_bytes(V3, 3, 5, **options) == 3 * 5 * 61 * (512 + 4 * 4 + 2 * 64)
        step = costs.decode_step(V3, 2, 3, 100, **options)
        plain = costs.decode_step(V3, 2, 3, 100, kind)
        assert sum(stage.cache_bytes for stage in step.stages) == 2 * (3 + 100) * 656
        assert [stage.flops for stage in step.stages] == [stage.flops for stage in plain.stages]
        assert plain.bytes - step.bytes == 2 * (3 + 100) * (1152 - 656)
        mha = [costs.decode_step(V3, 2, 3, 100, "mha", cache_dtype=d) for d in (None, "int8")]
        assert mha[0] == mha[1]

    def test_latents_of_sparse_attention_in_a_byte_a_number(self):
        v32, options = MLAConfig.from_preset("deepseek_v32"), {"cache_dtype": "int8"}
        assert costs.token_bytes(v32, "sparse", **options) == 656 + 2 * 128
        plain, small = (costs.decode_step(v32, 2, 3, 9000, "sparse", **o) for o in ({}, options))
        assert plain["index"] == small["index"]
        assert plain["scores"].cache_bytes - small["scores"].cache_bytes == 6 * 2048 * (1152 - 656)

    @parameterized.parameters(("float8_e4m3fn", 1 + 4 / 2**14), ("int8", 1), ("int4", 0.5625))
    def test_weights_as_they_are_stored(self, dtype, size):
        plain = costs.decode_step(V3, 2, 3, 100)
        small = costs.decode_step(V3, 2, 3, 100, weight_dtype=dtype)
        for one, two in zip(plain.stages, small.stages, strict=True):
            assert two.weight_bytes == math.ceil(one.weight_bytes / 2 * size)
            assert (two.flops, two.cache_bytes) == (one.flops, one.cache_bytes)
        row = costs.table(V3, costs.device("h200"), context=100, weight_dtype=dtype)[0]
        assert row.layer == costs.decode_step(V3, 1, 1, 100, weight_dtype=dtype)


if __name__ == "__main__":
    absltest.main()

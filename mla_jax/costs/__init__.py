"""What attention costs: numbers read, bytes cached, operations, roofline time, and which form wins.

Plain arithmetic on a config. Decoding reads the whole cache for every new token, so numbers read
per context token set its time until arithmetic takes over. Operations are matrix multiplications
only (a multiply-add is 2), on all S slots as compiled code does them; bytes are what stages read
and write at least, with the scores kept on the chip. Roofline: Williams et al. 2009.

Letters: B batch, T queries (new tokens per row), S slots (the context, new tokens included), N
heads, D hidden_size, Q q_lora_rank, R kv_lora_rank, H qk_nope_head_dim, P qk_rope_head_dim,
V v_head_dim, G heads of keys and values.

Kinds of attention, all with the config's N query heads (DeepSeek-V2, arXiv 2405.04434, table 1):

* "absorbed": MLA on cached latents, W_UK folded into the query: the form for decoding;
* "expanded": MLA on cached latents, expanded to keys and values of every head in each step;
* "expanded_cached": MLA that caches the expanded keys (H+P) and values (V) of every head;
* "sparse": absorbed on K tokens that an indexer chooses by keys of its own (index_topk);
* "mha", "gqa", "mqa": keys H wide and values V wide, projected from D, for G = N, gcd(N, 8) and 1
  heads; "gqa4" has G = 4, and so on.

When is MLA slower than MHA of the same heads? `slower_contexts` and `queries_until_slower` say,
for DeepSeek-V3 in bf16 at the peak rates of an H100 (an H200):

* Whole layer, one new token: never, at any context and batch. MLA's projections are smaller too
  (187 against 470 million weights), so it leads from the first token.
* Attention with the two folds (W_UK, W_UV: 34 MB that MHA has not) and no other projection: below
  530 tokens of context for one row, 25 for 32 rows. Scores and mixing alone: below 4.
* Many new tokens at once: MHA reads keys and values once for all of them, while MLA does 4.25x the
  arithmetic. Its scores and mixing are slower above 69 (48) new tokens; the whole layer with 128 of
  them in one row from 9,726 (4,997) tokens of context.

Launches are not counted; they decide for a model as small as the preset `tiny`.

Modules: `peaks` of accelerators, `counts` per token, `stages` of a step and their time, `choice` of
a form or a kind, `rows` of a table.
"""

from mla_jax.costs.choice import choose_form as choose_form
from mla_jax.costs.choice import compute_bound_queries as compute_bound_queries
from mla_jax.costs.choice import crossover_queries as crossover_queries
from mla_jax.costs.choice import queries_until_slower as queries_until_slower
from mla_jax.costs.choice import slower_contexts as slower_contexts
from mla_jax.costs.counts import KINDS as KINDS
from mla_jax.costs.counts import cache_bytes as cache_bytes
from mla_jax.costs.counts import cache_numbers as cache_numbers
from mla_jax.costs.counts import multiply_adds as multiply_adds
from mla_jax.costs.counts import numbers_read as numbers_read
from mla_jax.costs.counts import token_bytes as token_bytes
from mla_jax.costs.counts import weight_bytes as weight_bytes
from mla_jax.costs.peaks import Device as Device
from mla_jax.costs.peaks import device as device
from mla_jax.costs.peaks import devices as devices
from mla_jax.costs.rows import Row as Row
from mla_jax.costs.rows import table as table
from mla_jax.costs.stages import PARTS as PARTS
from mla_jax.costs.stages import Costs as Costs
from mla_jax.costs.stages import Stage as Stage
from mla_jax.costs.stages import decode_step as decode_step

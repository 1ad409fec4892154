"""New weights reach vLLM whole, at once and without a second copy of the model, and are sampled from."""

from __future__ import annotations

import gc
import statistics
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers.tiny_vllm import (
    CONFIGS,
    LONG,
    PROMPTS,
    changeable,
    changed_to,
    difference,
    largest_difference,
    logps_of,
    perturb,
    reference_logp,
    tiny_model,
    weights_of,
)
from ibro_lightning.engines import VLLMEngine
from ibro_lightning.engines.vllm_worker import chunks, tensors
from ibro_lightning.errors import RolloutError
from ibro_lightning.types import SamplingParams

EXACT = 1e-4
GROUPS = {
    "layer": ["model.layers.1."],
    "embedding and head": ["model.embed_tokens.weight", "lm_head.weight"],
    "last norm": ["model.norm.weight"],
    "nothing": [],
}


@pytest.mark.parametrize("name", CONFIGS, scope="module")
class TestSync:
    def test_new_weights_are_sampled_from_at_once(self, serve, name):
        """Five times, and always with a long prompt whose keys and values are cached from the time before."""
        engine, model = serve(name), changeable(name)
        for step in range(5):
            before = difference(engine, model)
            assert before < EXACT
            perturb(model, step, 0.3)
            assert difference(engine, model, [LONG]) > 0.05, "such a small change proves nothing"
            engine.load_weights(weights_of(model))
        assert difference(engine, model) < EXACT

    def test_every_single_weight_arrives(self, serve, name):
        """One at a time is changed, all are sent."""
        engine, model = serve(name), changeable(name)
        seen = []
        for parameter_name, parameter in model.named_parameters():
            if "k_proj.bias" in parameter_name:  # adds nearly the same to the scores of all keys: hardly an effect
                continue
            before = parameter.detach().clone()
            with torch.no_grad():
                parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
            assert difference(engine, model, [LONG], 1) > 5 * EXACT, f"{parameter_name} has no effect"
            engine.load_weights(weights_of(model))
            assert difference(engine, model, [LONG], 1) < EXACT, f"{parameter_name} did not arrive"
            with torch.no_grad():
                parameter.copy_(before)
            engine.load_weights(weights_of(model))
            seen.append(parameter_name)
        assert len(seen) > 15

    def test_the_order_of_the_names_does_not_matter(self, serve, name):
        engine, model = serve(name), changeable(name)
        perturb(model, 0, 0.3)
        engine.load_weights(reversed(list(weights_of(model))))
        assert difference(engine, model) < EXACT

    def test_the_engines_weights_are_its_own(self, serve, name):
        """An optimizer step must not reach the engine before the next sync."""
        engine, model = serve(name), changeable(name)
        engine.load_weights(weights_of(model))
        perturb(model, 0, 0.3)
        assert difference(engine, tiny_model(name)) < EXACT

    @pytest.mark.parametrize("group", GROUPS)
    def test_a_partial_sync_updates_only_what_is_given(self, serve, name, group):
        engine, model, new = serve(name), changeable(name), changeable(name, seed=1)
        given = [(n, t) for n, t in weights_of(new) if any(n.startswith(start) for start in GROUPS[group])]
        assert len(given) >= len(GROUPS[group])
        engine.load_weights(iter(given), partial=True)
        with torch.no_grad():
            for key, tensor in given:
                model.get_parameter(key).copy_(tensor)
        assert difference(engine, model) < EXACT
        # Whatever it left behind does not disturb the next full sync.
        engine.load_weights(weights_of(new))
        assert difference(engine, new) < EXACT

    def test_generation_after_a_partial_sync_forgets_cached_prefixes(self, serve, name):
        engine, model, new = serve(name), changeable(name), changeable(name, seed=1)
        assert difference(engine, model, [LONG]) < EXACT
        layer = [(n, t) for n, t in weights_of(new) if n.startswith("model.layers.0.")]
        engine.load_weights(layer, partial=True)
        model.load_state_dict(dict(layer), strict=False)
        assert difference(engine, model, [LONG]) < EXACT

    def test_weights_are_taken_one_at_a_time(self, serve, name):
        """Gathered weights of a sharded model exist only while they are passed on. vLLM keeps those of a layer until
        the layer is whole, and what it pads (embedding and head of an odd vocabulary) until the end."""
        engine, model = serve(name), changeable(name)
        perturb(model, 0, 0.3)
        alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        numbers: list[int] = []  # alive at each moment

        def one_by_one() -> Iterator[tuple[str, Tensor]]:
            for key, tensor in weights_of(model):
                copy = tensor.clone()
                alive.add(copy)
                numbers.append(sum(other.numel() for other in alive))
                yield key, copy
                del copy

        gc.collect()
        engine.load_weights(one_by_one())
        total = sum(tensor.numel() for _, tensor in weights_of(model))
        assert max(numbers) < 0.4 * total, "this is a second copy of the model"
        assert statistics.mean(numbers) < 0.3 * total
        gc.collect()
        assert len(alive) == 0, "weights are kept after the sync"
        assert difference(engine, model) < EXACT


@pytest.fixture(scope="class")
def few_engines(_engines) -> None:
    """An engine that closes itself takes the others' process groups away: let there be no others."""
    _engines.stop()


@pytest.mark.usefixtures("few_engines")
class TestRefusedWeights:
    """Half-synchronised weights would sample from a policy that never existed. After a refused sync the next sound one
    must mend everything, whatever state the first left vLLM in."""

    def mended(self, engine, name: str) -> bool:
        engine.load_weights(weights_of(tiny_model(name)))
        return difference(engine, tiny_model(name)) < EXACT

    @pytest.fixture
    def engine(self, serve) -> Iterator[VLLMEngine]:
        engine = serve("tied")
        yield engine
        try:
            sound = self.mended(engine, "tied")
        except RolloutError:
            sound = False
        if not sound:
            serve.stop()  # the next test gets a sound one

    @pytest.mark.parametrize("missing", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
    def test_a_missing_weight_is_named(self, engine, missing):
        """The head of a tied model, too: vLLM would keep the old one."""
        with pytest.raises((KeyError, RolloutError), match=missing):
            engine.load_weights((n, t) for n, t in weights_of(changeable("tied", 1)) if n != missing)
        assert self.mended(engine, "tied")

    @pytest.mark.parametrize("part", ["self_attn.q_proj.weight", "mlp.up_proj.weight"])
    def test_a_part_of_a_layer_is_refused(self, engine, part):
        """vLLM fuses matrices, and would take one of them and fill the others with whatever is in memory."""
        name = f"model.layers.1.{part}"
        given = {name: changeable("tied", 1).state_dict()[name]}
        with pytest.raises((KeyError, RolloutError), match=r"model\.layers\.1\."):
            engine.load_weights(given.items(), partial=True)
        assert self.mended(engine, "tied")

    def test_an_untied_model_needs_its_embedding(self, serve):
        engine, missing = serve("untied"), "model.embed_tokens.weight"
        with pytest.raises((KeyError, RolloutError), match=missing):
            engine.load_weights((n, t) for n, t in weights_of(changeable("untied", 1)) if n != missing)
        assert self.mended(engine, "untied")

    def test_no_weights_at_all(self, engine):
        with pytest.raises((KeyError, RolloutError), match="weights"):
            engine.load_weights(iter([]))
        assert self.mended(engine, "tied")

    @pytest.mark.parametrize(("place", "partial"), [(10, False), (1000, True)])
    def test_an_unknown_name_is_named(self, engine, place, partial):
        """vLLM leaves out what it does not know, without a word."""
        weights = list(weights_of(changeable("tied", 1)))
        weights.insert(place, ("model.layers.7.mlp.up_proj.weight", torch.zeros(96, 64)))
        with pytest.raises((KeyError, RolloutError), match=r"model\.layers\.7\.mlp"):
            engine.load_weights(iter(weights), partial=partial)
        assert self.mended(engine, "tied")

    @pytest.mark.parametrize(
        ("wrong", "shape"),
        [
            ("model.layers.0.mlp.gate_proj.weight", (64, 96)),
            ("model.norm.weight", (1,)),
        ],
    )
    def test_a_weight_of_another_shape_is_named(self, engine, wrong, shape):
        weights = {**changeable("tied", 1).state_dict(), wrong: torch.zeros(shape)}
        with pytest.raises((ValueError, RolloutError), match=wrong):
            engine.load_weights(iter(weights.items()))
        assert self.mended(engine, "tied")

    @pytest.mark.parametrize("error", [OSError("a rank was lost"), KeyboardInterrupt()], ids=repr)
    def test_an_error_of_the_trainer_while_gathering(self, engine, error):
        def breaks() -> Iterator[tuple[str, Tensor]]:
            yield from list(weights_of(changeable("tied", 1)))[:9]
            raise error

        with pytest.raises((type(error), RolloutError), match=str(error) or None):
            engine.load_weights(breaks())
        assert self.mended(engine, "tied")

    def test_generating_after_a_refused_sync_says_so_or_uses_whole_weights(self, engine):
        """Never garbage: an evaluation after a caught error would report it as the policy's."""
        new = changeable("tied", 1)
        with pytest.raises((KeyError, RolloutError)):
            engine.load_weights((n, t) for n, t in list(weights_of(new))[:9])
        try:
            generated = engine.generate(PROMPTS, SamplingParams(max_tokens=4), [[0] for _ in PROMPTS])
        except RuntimeError:
            pass
        else:
            old = largest_difference(tiny_model("tied"), PROMPTS, generated)
            assert min(old, largest_difference(new, PROMPTS, generated)) < EXACT
        assert self.mended(engine, "tied")


class TestDtypes:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_a_bfloat16_policy_and_a_float32_engine(self, serve, name):
        """The engine has the rounded weights exactly and computes in float32."""
        engine, model = serve(name), changeable(name, dtype=torch.bfloat16)
        for step in range(2):
            engine.load_weights(weights_of(model))
            assert difference(engine, changed_to(model, torch.float32)) < EXACT
            perturb(model, step, 0.3)

    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize("policy", [torch.float32, torch.bfloat16], ids=str)
    def test_a_bfloat16_engine(self, serve, name, policy):
        """As far from the float32 model as transformers in bfloat16 is, or less."""
        engine, model = serve(name, dtype="bfloat16"), changeable(name, dtype=policy)
        params, seeds = SamplingParams(max_tokens=8), [list(range(10)) for _ in PROMPTS]
        for step in range(2):
            perturb(model, step, 0.3)
            engine.load_weights(weights_of(model))
            generated = engine.generate(PROMPTS, params, seeds)
            rounded, exact = (
                changed_to(model, torch.bfloat16),
                changed_to(changed_to(model, torch.bfloat16), torch.float32),
            )
            rows = [
                (torch.tensor(sample.logp), prompt, sample.token_ids)
                for prompt, samples in zip(PROMPTS, generated, strict=True)
                for sample in samples
            ]
            found = torch.cat([logp - reference_logp(exact, *row) for logp, *row in rows]).abs()
            usual = torch.cat([reference_logp(rounded, *row) - reference_logp(exact, *row) for _, *row in rows]).abs()
            old = torch.cat([logp - reference_logp(tiny_model(name), *row) for logp, *row in rows]).abs()
            assert found.mean() < 1.5 * usual.mean() < 0.1 * old.mean()
            assert found.quantile(0.98) < 2 * usual.quantile(0.98)

    def test_log_probs_of_a_bfloat16_engine_are_not_rounded_themselves(self, serve):
        """float32 log-probs of bfloat16 logits: else ratios would jump in steps of 2 ** -8."""
        logp = logps_of(
            serve("untied", dtype="bfloat16").generate(
                PROMPTS, SamplingParams(max_tokens=8), [[1], [2], [3], [4], [5], [6]]
            )
        )
        assert not torch.equal(logp, logp.bfloat16().float())


class TestPieces:
    """How weights travel to other processes; the journey itself is in test_vllm_processes.py."""

    @pytest.mark.parametrize("limit", [1, 5000, 10**9])
    def test_pieces_and_back(self, limit):
        weights = [
            ("matrix", torch.randn(7, 5)),
            ("transposed", torch.randn(5, 7).T),
            ("bfloat16", torch.randn(300).bfloat16()),
            ("float16", torch.randn(3, 1, 2).half()),
            ("scalar", torch.tensor(3.5)),
            ("integers", torch.arange(5)),
            ("a view", torch.randn(10, 10)[2:5, ::2]),
            ("needs grad", torch.nn.Parameter(torch.randn(2, 2))),
        ]
        pieces = list(chunks(iter(weights), limit))
        assert len(pieces) == (8 if limit == 1 else 1)
        back = [weight for chunk in pieces for weight in tensors(chunk)]
        assert [name for name, _ in back] == [name for name, _ in weights]
        for (_, sent), (_, received) in zip(weights, back, strict=True):
            assert received.dtype == sent.dtype
            assert torch.equal(received, sent.detach())

    def test_pieces_are_about_as_large_as_allowed(self):
        sizes = [10, 20, 30, 100, 5, 5]
        pieces = chunks([(str(size), torch.zeros(size)) for size in sizes], limit=4 * 35)
        assert [[name for name, *_ in chunk] for chunk in pieces] == [["10", "20"], ["30"], ["100"], ["5", "5"]]

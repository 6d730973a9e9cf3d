"""A recipe's subspace: public texts in the prompt → scores → directions (method.md section 9)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from meerkat.config.sections import SubspaceSection
from meerkat.data.chat_encoding import ChatEncoder
from meerkat.data.encoding import Encoded
from meerkat.errors import RecipeError
from meerkat.models.objective import TextObjective
from meerkat.runs.finding_mask import FoundMask, Sources
from meerkat.runs.mask_cache import cache_path, corpus_digests, read_cached
from meerkat.runs.modalities.texts import packed_scores
from meerkat.runs.public_texts import corpus_of
from meerkat.spaces.alignment import Scheme, Target, packed_score_gradients, score_gradients
from meerkat.spaces.answers import drawn_answer
from meerkat.spaces.balance import balanced_start
from meerkat.spaces.example_gradients import has_example_gradients
from meerkat.spaces.linear import LinearSpace, subspace_of
from meerkat.spaces.mask_file import Mask, save_mask
from meerkat.spaces.masked import MaskedSpace
from meerkat.spaces.subspace import Subspace, settings_of
from meerkat.spaces.whitening import whitened
from meerkat.transport.handshake import same_probe
from meerkat.zo.noise import NoiseKey, draw

__all__ = ["find_subspace", "renewed_subspace", "slopes_along"]

_METHOD = 4
"""Raised when the same settings give other bits than before, so that what is cached is not used."""
_BALANCED = 128
"""Most texts over which more than two answers are balanced: a backward pass for each answer."""
_TOGETHER = 16
"""Texts of one backward pass."""


def find_subspace(sources: Sources, mask: Mask, section: SubspaceSection) -> FoundMask:
    """A mask with the directions within it that a recipe asks for: from the cache, or made.

    Raises:
        DataError: The corpus cannot be read, or has too few sentences.
        RecipeError: There are fewer directions than `subspace.dimensions`.
    """
    if section.kind == "random":
        return FoundMask(replace(mask, subspace=_random(mask, section)))
    path = cache_path(sources.recipe.runtime, "subspaces", _fixed_by(sources, mask, section))
    kept = read_cached(path, sources.loaded.fingerprint)
    if kept is not None and same_probe(sources.loaded.probe, kept.probe):
        return FoundMask(replace(mask, subspace=kept.subspace), path)
    mask = replace(mask, subspace=_aligned(sources, mask, section))
    save_mask(mask, path)
    return FoundMask(mask, path)


def renewed_subspace(
    sources: Sources,
    mask: Mask,
    weights: Float32[np.ndarray, " n"],
    corpus: str | tuple[str, ...] | None = None,
) -> Mask:
    """The mask with a subspace that is made at these weights, which are its w = 0.

    The model's own weights are there again when the call returns.

    Args:
        mask: With the subspace that led to them.
        corpus: Where texts come from now; as the recipe says by default.

    Raises:
        DataError, RecipeError: As `find_subspace`.
    """
    section = sources.recipe.subspace
    assert section is not None, "a recipe without one renews nothing"
    changes = {"start": "loaded"} | ({} if corpus is None else {"corpus": corpus})
    space = MaskedSpace(sources.loaded.model, mask)
    space.write(weights)
    try:
        found = _aligned(sources, mask, section.model_copy(update=changes))
    finally:
        space.restore()
    about = dict(found.about) | {"settings": settings_of(section)}
    return replace(mask, subspace=replace(found, base=weights, about=about))


def slopes_along(
    sources: Sources, mask: Mask, section: SubspaceSection, encoded: Sequence[Any]
) -> Float64[np.ndarray, "N k"]:
    """Slope along each direction of a mask's subspace of what was differentiated to make it, for
    other texts; no label takes part."""
    assert mask.subspace is not None, "slopes along the directions of a subspace"
    scheme = _scheme(section, len(sources.task.verbalizers))
    if not sources.task.has_classes:
        encoded = _with_answers(sources, encoded, section)
    sources.progress.start("Comparing texts", len(encoded))
    scores = _score_gradients(sources, encoded, mask, scheme, section.seed)
    return np.asarray(scores @ mask.subspace.basis.T, np.float64)


def _fixed_by(sources: Sources, mask: Mask, section: SubspaceSection) -> dict[str, Any]:
    """All that the bits of an aligned subspace, and of the mask's file with it, follow from."""
    loaded, task, of_corpus = sources.loaded, sources.task, corpus_of(sources, section)
    gradient = b"" if mask.gradient is None else mask.gradient.tobytes()
    encoder = sources.encoder
    chat = {"template": encoder.template.text} if isinstance(encoder, ChatEncoder) else {}
    return chat | {
        "method": _METHOD,
        "model": [loaded.fingerprint, loaded.configuration],
        "mask": [mask.digest, mask.kind, hashlib.sha256(gradient).hexdigest()],
        "task": [task.prompt, task.verbalizers, task.cut_field, sources.encoder.max_length],
        "corpus": of_corpus.model_dump(
            mode="json",
            include={"corpus", "corpus_config", "corpus_split", "corpus_column", "seed"},
        ),
        "files": corpus_digests(of_corpus.corpus),
        "settings": settings_of(section),
        "ends": [] if task.has_classes else sorted(loaded.ends),
    }


def _random(mask: Mask, section: SubspaceSection) -> Subspace:
    drawn = [draw(NoiseKey(section.seed, 2, 0, 0, j), mask.size) for j in range(section.dimensions)]
    rows = np.stack(drawn) / np.float32(np.sqrt(mask.size))
    about = {"settings": settings_of(section)}
    return subspace_of("random", rows, np.ones(section.dimensions), about)


def _aligned(sources: Sources, mask: Mask, section: SubspaceSection) -> Subspace:
    """From the gradients of the model's own answers to public texts."""
    examples = sources.modality.public_examples(sources, section)
    encoded = [sources.encoder.encode(example) for example in examples]
    scheme = _scheme(section, len(sources.task.verbalizers))
    if not sources.task.has_classes:
        encoded = _with_answers(sources, encoded, section)
    sources.progress.start("Finding the subspace", len(encoded))
    scores = _score_gradients(sources, encoded, mask, scheme, section.seed)
    try:
        basis = whitened(scores, section.dimensions, section.damping, section.power)
    except ValueError as error:
        raise RecipeError(
            f"subspace.dimensions = {section.dimensions}: {error}; lower it or raise subspace.texts"
        ) from None
    content = "\n".join(
        json.dumps(dict(example.fields), sort_keys=True, default=str) for example in examples
    )
    about = {
        "prompt": sources.task.prompt,
        "answers": json.dumps(sources.task.verbalizers),
        "texts": hashlib.sha256(content.encode()).hexdigest(),
        "score": "sampled" if scheme == "given" else scheme,
        "settings": settings_of(section),
    }
    found = subspace_of("aligned", basis.rows, basis.curvature, about)
    answers = len(sources.task.verbalizers)
    if not answers or section.start == "loaded" or (section.start == "auto" and answers > 2):
        return found
    if scheme == "difference":
        mean = found.basis.astype(np.float64) @ scores.mean(axis=0, dtype=np.float64)
        jacobian = np.stack([-mean / 2, mean / 2])
    else:
        encoded = encoded[:_BALANCED]
        jacobian = _answer_slopes(sources, encoded, mask, found)
    return replace(found, start=_balanced(sources, encoded, mask, found, jacobian))


def _answer_slopes(
    sources: Sources, encoded: Sequence[Any], mask: Mask, found: Subspace
) -> Float64[np.ndarray, "A k"]:
    """Change of each answer's mean score with w, less the mean of these."""
    answers, basis = len(sources.task.verbalizers), found.basis.astype(np.float64)
    sources.progress.start("Balancing the answers", answers * len(encoded))
    slopes = np.empty((answers, len(basis)))
    for answer in range(answers):
        gradient = _score_gradients(sources, encoded, mask, answer).mean(axis=0, dtype=np.float64)
        slopes[answer] = basis @ gradient
    return _centred(slopes)


def _balanced(
    sources: Sources,
    encoded: Sequence[Any],
    mask: Mask,
    found: Subspace,
    jacobian: Float64[np.ndarray, "A k"],
) -> Float32[np.ndarray, " k"]:
    """w at which these texts prefer no answer on average."""
    objective = sources.objective
    space = LinearSpace(MaskedSpace(sources.loaded.model, mask), found.basis, "")

    def preferences(w: Float32[np.ndarray, " k"]) -> Float64[np.ndarray, " A"]:
        space.write(w)
        return _centred(objective.scores_of(encoded).mean(0).cpu().numpy())

    try:
        return balanced_start(jacobian, preferences)
    finally:
        space.restore()


def _centred(values: Float64[np.ndarray, "A ..."]) -> Float64[np.ndarray, "A ..."]:
    return values - values.mean(axis=0)


def _scheme(section: SubspaceSection, answers: int) -> Scheme:
    """Which scores; a task of free text has no list of answers, so its answers are drawn before."""
    if not answers:
        if section.score not in ("auto", "sampled"):
            raise RecipeError(
                f"subspace.score = {section.score!r} goes through a list of answers, which a task "
                "of free text has not; take 'sampled'"
            )
        return "given"
    if section.score == "auto":
        return "difference" if answers == 2 else "mixed"
    if section.score == "difference" and answers != 2:
        raise RecipeError(
            f"subspace.score = 'difference' is for two answers, the task has "
            f"{answers}; take 'mixed'"
        )
    return section.score


def _score_gradients(
    sources: Sources, encoded: Sequence[Any], mask: Mask, scheme: Target, seed: int = 0
) -> Float32[np.ndarray, "N n"]:
    """Many texts in a backward pass where the mask allows it, else one."""
    model, objective = sources.loaded.model, sources.objective
    advance = sources.progress.advance
    if isinstance(objective, TextObjective) and has_example_gradients(model, mask):
        batches = (
            batch
            for begin in range(0, len(encoded), _TOGETHER)
            for batch in objective.packs(encoded[begin : begin + _TOGETHER])
        )
        scores = partial(packed_scores, objective)
        return packed_score_gradients(
            scores, model, batches, len(encoded), mask, scheme, seed, advance
        )
    of_one = partial(sources.modality.answer_scores, objective)
    parameters = dict(model.named_parameters())
    return score_gradients(of_one, parameters, encoded, mask, scheme, seed, advance)


def _with_answers(
    sources: Sources, encoded: Sequence[Any], section: SubspaceSection
) -> list[Encoded]:
    """Each prompt with one answer that the model draws."""
    model, ends = sources.loaded.model, sources.loaded.ends
    generator = np.random.Generator(np.random.Philox(section.seed))
    sources.progress.start("Drawing answers", len(encoded))
    found = []
    for example in encoded:
        room = max(1, sources.encoder.max_length - len(example.prompt) + 1)
        most = min(section.answer_tokens, room)
        answer = drawn_answer(model, example.prompt, most, ends, generator)
        found.append(Encoded(example.prompt, (answer,), 0))
        sources.progress.advance()
    return found

"""What calibration images say about images to come: bootstrap intervals, and promises by Learn then Test.

All of it assumes that the images to come are drawn independently from the same source as the calibration images: the same cameras, places,
seasons, labels. Nothing here covers a change of these.

Sources: Angelopoulos et al., "Learn then Test", arXiv 2110.01052 (fixed sequence testing, Hoeffding-Bentkus p-value); Jazbec et al., "Fast
yet Safe: Early-Exiting with Risk Control", NeurIPS 2024, arXiv 2405.20915 (risks against the final exit and against the labels).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from scipy.stats import binom

from mess_runtime.bundle import check
from mess_tf.files import RISKS, Stats

RESAMPLES = 2000
INTERVAL = 0.95

Choice = TypeVar("Choice")


def resamples(images: int) -> np.ndarray:
    """How often each image is drawn in each bootstrap sample: float64 [2000, I], the same at every call."""
    return np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=RESAMPLES).astype(np.float64)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of values."""
    low, high = np.quantile(values, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return float(low), float(high)


def split(stats: Stats, check_share: float) -> tuple[Stats, Stats]:
    """Splits the images at random, the same way at every call, into those that choose and those that check.

    Args:
      stats: of all images.
      check_share: share of the images that check, between 0 and 1.

    Raises:
      ValueError: a part would be empty.
    """
    choosing, checking = split_positions(len(stats.images), check_share)
    return select(stats, choosing), select(stats, checking)


def split_positions(images: int, check_share: float) -> tuple[np.ndarray, np.ndarray]:
    """As `split`, of so many images: the positions of those that choose, and of those that check."""
    checks = round(check_share * images)
    check(0 < checks < images, "check_share", f"such that of {images} images some choose and some check", check_share)
    shuffled = np.random.default_rng(0).permutation(images)
    return np.sort(shuffled[checks:]), np.sort(shuffled[:checks])


def select(stats: Stats, images: np.ndarray) -> Stats:
    """The statistics of some images, by position; an image may appear several times."""
    begins = np.searchsorted(stats.image_of_pair, np.arange(len(stats.images) + 1))
    pairs = np.concatenate([np.arange(*begins[image : image + 2]) for image in images])
    drawn = {name: getattr(stats, name)[..., pairs] for name in ("class_of_pair", "labelled", "tp", "fp")}
    drawn |= {name: getattr(stats, name)[:, images] for name in ("confident", "changed")}
    drawn["image_of_pair"] = np.repeat(np.arange(images.size, dtype=np.int32), np.diff(begins)[images])
    names = tuple(f"{stats.images[image]}#{number}" for number, image in enumerate(images.tolist()))
    return dataclasses.replace(stats, images=names, pixels=stats.pixels[images], **drawn)


def image_losses(stats: Stats, candidate: np.ndarray, risk: str, reference: Stats | None = None) -> np.ndarray:
    """Loss of each image at the candidate where it leaves, 0..1; see `Guarantee`.

    Args:
      stats: of the images.
      candidate: int64 [I].
      risk: `final`, or `labels`.
      reference: of the same images, for `labels` against the original network in another precision.
    """
    check(risk in RISKS, "risk", f"one of {', '.join(RISKS)}", risk)
    if risk == "final":
        return stats.changed[candidate, np.arange(candidate.size)] / stats.pixels
    (final, _, missed), (here, _, _) = (reference or stats).counts(-1), stats.counts(candidate)
    labelled = np.maximum((final + missed).sum(axis=1), 1)
    return np.maximum(final.sum(axis=1) - here.sum(axis=1), 0) / labelled


def p_value(losses: np.ndarray, max_risk: float) -> float:
    """Hoeffding-Bentkus p-value of the hypothesis that the mean loss exceeds `max_risk`, from losses in 0..1 of independent images."""
    check(0 < max_risk < 1, "max_risk", "between 0 and 1", max_risk)
    n, mean = losses.size, float(losses.mean())
    low = min(mean, max_risk)
    divergence = (low * math.log(low / max_risk) if low else 0.0) + (1 - low) * math.log((1 - low) / (1 - max_risk))
    bentkus = math.e * binom.cdf(math.ceil(n * mean - 1e-9), n, max_risk)
    return float(min(math.exp(-n * divergence), bentkus, 1.0))


def last_shown(path: Iterable[Choice], losses_of: Callable[[Choice], np.ndarray], max_risk: float, confidence: float) -> Choice | None:
    """The last of a path whose risk is shown to be at most `max_risk`, up to the first that fails; None if the first one fails.

    Each is tested at the full level, since all before it have passed (fixed sequence testing). So the path must not depend on the images
    that the losses are of. With at least the probability `confidence`, nothing that passes exceeds the risk.
    """
    shown = None
    for each in path:
        if p_value(losses_of(each), max_risk) > 1 - confidence:
            break
        shown = each
    return shown


def least_risk(images: int, confidence: float) -> float:
    """The smallest limit on a risk that so many images without any loss show."""
    return 1 - (1 - confidence) ** (1 / images)

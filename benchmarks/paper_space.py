"""Drawn statistics of the size of the paper's space, for benchmarks of the search: no network has to be trained for them."""

import numpy as np

from mess_tf.files import Stats, packed


def drawn_stats(exits: int = 5, heads: int = 80, images: int = 500, classes: int = 21, thetas: int = 10, seed: int = 0) -> Stats:
    """Draws statistics that look like those of a trained network.

    Images differ in how hard they are, exits and classes too; deeper exits and dearer heads are better on the whole, but not on every
    image. As with Pascal VOC, background is the largest class, and the others are in few images. The rest follows what a trained MESS
    network shows on CamVid (6 exits, 12 heads each), where the worth of an image is what it adds to mIoU compared with the final exit:
    - Exits share errors: each deeper one drops a part of those of the exit before, so neighbours, and deep exits above all, are alike.
      Between heads of one exit the worth of images correlates by 0.7, of the first two exits by 0.4 to 0.6, of deep ones by 0.7.
    - The rank correlation of confidence and accuracy is 0.5 to 0.7, as an image that looks easier than it is does so to all heads (0.7
      to 0.8 between their confidences). That of neighbouring theta_pix is 0.9 and above, that of plain and edge-aware confidence 0.99.

    Args:
      exits: early ones, each with so many heads.
      images, classes, thetas: sizes.
      seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    side, pixels = 320, 320 * 320
    exit_of = np.append(np.repeat(np.arange(exits), heads), exits)

    present = rng.random((images, classes)) < np.clip(0.25 / np.sqrt(np.arange(1, classes + 1)), 0.06, 1)
    present[:, 0] = True
    present[np.arange(images), rng.integers(1, classes, images)] = True
    share = rng.gamma(1.0, 1.0, (images, classes)) * present
    share[:, 0] *= 4
    labelled = np.floor(share / share.sum(1, keepdims=True) * pixels).astype(np.int64)
    labelled[:, 0] += pixels - labelled.sum(1)

    size = np.append(rng.beta(1.2, 2.5, exits * heads), 0.5)
    quality = np.append(np.minimum(0.5 * np.sqrt(size[:-1]) + rng.normal(0, 0.12, exits * heads) - 0.3, 0.35), 0.4)
    depth = 1.6 * (1 - 0.45 ** np.arange(exits + 1)) / (1 - 0.45**exits)
    hard = rng.normal(0, 1, images) + 1.2 * (rng.random(images) < 0.25)
    ease = rng.normal(0, 0.5, classes) - 0.75 * hard[:, None]  # [images, classes]
    ease[:, 0] += 1.2
    dropped = rng.normal(0, 0.5, (exits + 1, images, 1)) + rng.normal(0, 0.35, (exits + 1, images, classes))
    dropped *= np.append(np.sqrt(np.append(np.diff(depth)[:-1], 0.35)), 0)[:, None, None]
    of_exit = np.cumsum(dropped[::-1], axis=0)[::-1]
    looks = rng.normal(0, 0.9, images)

    theta_pix = np.round(np.linspace(0.4, 0.99, thetas), 4)
    tp = np.zeros((exit_of.size, images, classes), np.int64)
    fp, changed = np.zeros_like(tp), np.zeros(tp.shape[:2], np.int32)
    confident = np.zeros((exit_of.size, images, thetas, 2), np.int32)
    for k, e in enumerate(exit_of):
        noise = rng.normal(0, 0.25, (images, 1)) + rng.normal(0, 0.25, (images, classes))
        noise *= 2 - depth[e] / depth[-1]
        recall = 1 / (1 + np.exp(-(0.4 + depth[e] + 0.8 * quality[k] + ease + of_exit[e] + noise)))
        tp[k] = np.round(labelled * recall)
        # Each missed pixel goes to another class, mostly to one that the image holds.
        missed = labelled - tp[k]
        attraction = present * (1 + rng.gamma(2, 0.3, (images, classes))) + 0.03 * rng.random(classes)
        ratio = missed / (attraction.sum(1, keepdims=True) - attraction)
        fp[k] = np.floor(attraction * (ratio.sum(1, keepdims=True) - ratio))
        fp[k, :, 0] += missed.sum(1) - fp[k].sum(1)
        accuracy = tp[k].sum(1) / pixels
        sure = np.log(accuracy / (1 - accuracy + 1e-6)) + looks + rng.normal(0, 0.5, images)
        sure = sure[:, None] + 3 * np.linspace(-0.5, 0.5, thetas) * rng.normal(0, 1, (images, 1))
        for edge_aware, spread in enumerate((0.0, 0.1)):
            score = 1.2 * (sure + rng.normal(0, spread, (images, 1)) + 0.3 * edge_aware) + 1.5 - 4.5 * (theta_pix - 0.4) / 0.59
            confident[k, :, :, edge_aware] = np.round(pixels / (1 + np.exp(-score)))
        changed[k] = missed.sum(1) // 2 if e < exits else 0

    total = 10_000_000_000
    prefix_macs = (total * np.arange(1, exits + 2) / (exits + 1)).astype(np.int64)
    head_macs = (total * (0.003 + 0.09 * size**1.5)).astype(np.int64)
    names = [f"exit{e + 1}.head{h}" for e in range(exits) for h in range(heads)] + ["final.original"]
    none = {f"{part}_sha256": ("",) * len(names) for part in ("head", "mask", "plain", "edge")}
    return Stats(
        split="drawn",
        fidelity="exact",
        candidates=tuple(names),
        images=tuple(f"image{i}" for i in range(images)),
        classes=tuple(f"class{c}" for c in range(classes)),
        pixels=np.full(images, pixels),
        **packed(tp, fp, labelled),
        theta_pix=theta_pix,
        confident=np.minimum.accumulate(confident, axis=2),
        changed=changed,
        prefix_macs=prefix_macs,
        head_macs=head_macs,
        prefix_parameters=prefix_macs // 250,
        head_parameters=head_macs // 1000,
        prefix_memory_bytes=np.full(exits + 1, 4 * side * side * 64),
        head_memory_bytes=(4 * side * side * (16 + 64 * size)).astype(np.int64),
        prefix_sha256=("",) * (exits + 1),
        made_by="{}",
        **none,
    )

"""Early exit with MediaPipe: `python segment.py FOLDER photo.jpg ...` prints exit and score, writes photo.mask.png; FOLDER is an export."""

import json
import sys
from pathlib import Path

import mediapipe as mp
import numpy as np
from mediapipe.tasks.python.vision import image_segmenter
from PIL import Image, ImageOps


class Result(image_segmenter.ImageSegmenterResult):
    """With the quality scores, which MediaPipe's package for Python leaves out; those for Android, iOS and the web have them."""

    @classmethod
    def from_ctypes(cls, c_result):
        result = super().from_ctypes(c_result)
        result.quality_scores = c_result.quality_scores[: c_result.quality_scores_count]
        return result


image_segmenter.ImageSegmenterResult = Result


class EarlyExit:
    """One exit after another, until one is sure."""

    def __init__(self, folder):
        self.input, self.palette, self.exits = json.loads(Path(folder, "early_exit.json").read_text()).values()
        self.segmenters = []
        for each in self.exits:
            file = mp.tasks.BaseOptions(model_asset_path=str(Path(folder, each["file"])))
            options = image_segmenter.ImageSegmenterOptions(file, output_category_mask=True, output_confidence_masks=False)
            self.segmenters.append(image_segmenter.ImageSegmenter.create_from_options(options))

    def fit(self, photo):
        """A photo (PIL) at the network's size, as in training: upright, smoothly, across the width first, grey where it does not reach."""
        if photo.mode[0] in "IF":  # more than 8 bits, which Pillow would clip
            raise ValueError(f"must have 8 bits per channel, got Pillow's mode {photo.mode}")
        photo = ImageOps.exif_transpose(photo).convert("RGB")
        width, height = self.input["width"], self.input["height"]
        frame = Image.new("RGB", (width, height), (128, 128, 128))
        if self.input["resize"] == "letterbox":
            width = min(frame.width, max(1, (2 * photo.width * frame.height + photo.height) // (2 * photo.height)))
            height = min(frame.height, max(1, (2 * photo.height * frame.width + photo.width) // (2 * photo.width)))
        photo = photo.resize((width, photo.height), Image.Resampling.BILINEAR).resize((width, height), Image.Resampling.BILINEAR)
        frame.paste(photo, ((frame.width - width) // 2, (frame.height - height) // 2))
        return frame

    def run(self, photo):
        """A photo (PIL) to the name of the exit, its score and the mask, uint8 [height, width] of the network's input."""
        image = mp.Image(image_format=mp.ImageFormat.SRGB, data=np.asarray(self.fit(photo)))
        for each, segmenter in zip(self.exits, self.segmenters, strict=True):
            result = segmenter.segment(image)
            if result.quality_scores[0] >= each["leave_from"]:
                break
        return each["exit"], result.quality_scores[0], np.squeeze(result.category_mask.numpy_view())


if __name__ == "__main__":
    path, *photos = sys.argv[1:] or [""]
    if not photos:
        sys.exit("usage: python segment.py FOLDER photo.jpg ...")
    if missing := [photo for photo in photos if not Path(photo).is_file()]:
        sys.exit(f"{missing[0]}: must be a file")
    masks = [f"{Path(photo).stem}.mask.png" for photo in photos]
    if len({str(Path(file).resolve()).casefold() for file in [*photos, *masks]}) < 2 * len(photos):
        sys.exit("photos: must have different names, and none the name of another's mask, such as photo.mask.png")
    try:
        early_exit = EarlyExit(path)
        for path, mask in zip(photos, masks, strict=True):
            name, score, classes = early_exit.run(Image.open(path))
            print(path, name, score)
            picture = Image.fromarray(classes)
            picture.putpalette(np.uint8(early_exit.palette).tobytes())
            picture.save(mask)
    except Exception as error:  # of what a broken file makes Pillow or MediaPipe raise
        sys.exit(f"{path}: {error!r}")

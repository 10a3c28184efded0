"""Early exit with MediaPipe: `python segment.py FOLDER photo.jpg ...` prints exit and score, writes photo.png; FOLDER is of the export."""

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

    def run(self, photo):
        """A photo (PIL) to the name of the exit, its score and the mask, uint8 [height, width] of the network's input."""
        photo, size = photo.convert("RGB"), (self.input["width"], self.input["height"])
        if self.input["resize"] == "letterbox":
            photo = ImageOps.pad(photo, size, Image.Resampling.BILINEAR, (128, 128, 128))
        photo = photo.resize(size, Image.Resampling.BILINEAR)  # smoothly, as in training
        image = mp.Image(image_format=mp.ImageFormat.SRGB, data=np.asarray(photo))
        for each, segmenter in zip(self.exits, self.segmenters, strict=True):
            result = segmenter.segment(image)
            if result.quality_scores[0] >= each["leave_from"]:
                break
        return each["exit"], result.quality_scores[0], np.squeeze(result.category_mask.numpy_view())


if __name__ == "__main__":
    early_exit = EarlyExit(sys.argv[1])
    for path in sys.argv[2:]:
        with Image.open(path) as photo:
            name, score, mask = early_exit.run(ImageOps.exif_transpose(photo))
        print(path, name, score)
        picture = Image.fromarray(mask)
        picture.putpalette(np.uint8(early_exit.palette).tobytes())
        picture.save(f"{Path(path).stem}.png")

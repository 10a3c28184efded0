// Brings an image to a network's input as `mess_runtime.images.fit` does in Python, with the same bits.
//
// Bilinear and antialiased: a new pixel is the mean of the old ones around its centre, their weights falling linearly to 0 at a distance of
// max(1, reduction); across the width first, then across the height, each rounded to whole values; weights in units of 2**-22.

#ifndef MESS_FIT_H_
#define MESS_FIT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mess {

struct Image {
  int height, width;
  std::vector<uint8_t> rgb;  // height * width * 3
};

// Rows and columns of the input that the image takes.
struct Place {
  int top, left, height, width;
};

inline Place Placed(int height, int width, int input_height, int input_width, bool letterbox) {
  int64_t rows = input_height, columns = input_width;
  if (letterbox) {  // whole numbers, rounded half up
    if (rows * width <= columns * height) {
      columns = std::min<int64_t>(columns, std::max<int64_t>(1, (2 * width * rows + height) / (2 * height)));
    } else {
      rows = std::min<int64_t>(rows, std::max<int64_t>(1, (2 * height * columns + width) / (2 * width)));
    }
  }
  const int h = static_cast<int>(rows), w = static_cast<int>(columns);
  return {(input_height - h) / 2, (input_width - w) / 2, h, w};
}

// `lines` lines of `size` pixels of 3 values, resized to `new_size` pixels each; `pixel` and `line` are the steps to the next, in values.
inline std::vector<uint8_t> ResizedAlong(
    const std::vector<uint8_t>& old, int lines, int line, int size, int pixel, int new_size, int new_line, int new_pixel) {
  constexpr int kBits = 22;
  std::vector<uint8_t> made(static_cast<size_t>(lines) * new_size * 3);
  const double scale = static_cast<double>(size) / new_size, reach = std::max(1.0, scale);
  std::vector<double> shares;
  std::vector<int32_t> weights;
  for (int position = 0; position < new_size; ++position) {
    const double centre = (position + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(centre - reach + 0.5)), stop = std::min(size, static_cast<int>(centre + reach + 0.5));
    shares.clear();
    double sum = 0;
    for (int at = first; at < stop; ++at) {
      shares.push_back(std::max(0.0, 1.0 - std::fabs((at - centre + 0.5) * (1.0 / reach))));
      sum += shares.back();
    }
    weights.clear();
    for (double share : shares) weights.push_back(static_cast<int32_t>(0.5 + share / sum * (1 << kBits)));
    for (int each = 0; each < lines; ++each) {
      for (int channel = 0; channel < 3; ++channel) {
        int32_t value = 1 << (kBits - 1);
        for (int at = first; at < stop; ++at) {
          value += weights[at - first] * old[static_cast<size_t>(each) * line + static_cast<size_t>(at) * pixel + channel];
        }
        made[static_cast<size_t>(each) * new_line + static_cast<size_t>(position) * new_pixel + channel] =
            static_cast<uint8_t>(std::min(255, std::max(0, value >> kBits)));
      }
    }
  }
  return made;
}

// The image at the input's size, grey where it does not fill it.
inline Image Fit(const Image& image, int height, int width, bool letterbox) {
  if (image.height == height && image.width == width) return image;
  const Place place = Placed(image.height, image.width, height, width, letterbox);
  std::vector<uint8_t> pixels = image.rgb;
  if (place.width != image.width) {
    pixels = ResizedAlong(pixels, image.height, 3 * image.width, image.width, 3, place.width, 3 * place.width, 3);
  }
  if (place.height != image.height) {
    pixels = ResizedAlong(pixels, place.width, 3, image.height, 3 * place.width, place.height, 3, 3 * place.width);
  }
  Image fitted{height, width, std::vector<uint8_t>(static_cast<size_t>(height) * width * 3, 128)};
  for (int row = 0; row < place.height; ++row) {
    const auto from = pixels.begin() + static_cast<size_t>(row) * place.width * 3;
    std::copy(from, from + place.width * 3, fitted.rgb.begin() + (static_cast<size_t>(place.top + row) * width + place.left) * 3);
  }
  return fitted;
}

}  // namespace mess

#endif  // MESS_FIT_H_

// Makes the input of mess_runner from a photo of any size: fit.h as a program.
//
//   mess_fit photo.ppm HEIGHT WIDTH stretch|letterbox uint8|float32 image.rgb
//
// photo.ppm: binary PPM, upright (`djpeg`, ImageMagick and Pillow write it); the other values are those of `input` in manifest.json.
//
//   g++ -std=c++17 -O2 mess_fit.cc -o mess_fit

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>

#include "fit.h"

namespace {

[[noreturn]] void Fail(const std::string& message) {
  std::cerr << "mess_fit: " << message << "\n";
  std::exit(1);
}

mess::Image ReadPpm(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  long width = 0, height = 0, maximum = 0;
  file >> kind >> width >> height >> maximum;
  file.get();
  if (!file || kind != "P6" || maximum != 255) Fail(std::string(path) + ": must be a binary PPM of 8 bits without comments");
  if (width < 1 || height < 1 || width > 1 << 15 || height > 1 << 15) Fail(std::string(path) + ": must have sides of 1 to 32768 pixels");
  mess::Image image{static_cast<int>(height), static_cast<int>(width), std::vector<uint8_t>(static_cast<size_t>(height) * width * 3)};
  file.read(reinterpret_cast<char*>(image.rgb.data()), static_cast<std::streamsize>(image.rgb.size()));
  if (!file) Fail(std::string(path) + ": ends before its last pixel");
  return image;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) Fail("usage: mess_fit photo.ppm HEIGHT WIDTH stretch|letterbox uint8|float32 image.rgb");
  const auto side = [](const char* text) {
    char* end;
    const long value = std::strtol(text, &end, 10);
    return *end == 0 && value <= 1 << 15 ? static_cast<int>(value) : 0;
  };
  const int height = side(argv[2]), width = side(argv[3]);
  const std::string resize = argv[4], type = argv[5];
  if (height < 1 || width < 1) Fail(std::string("HEIGHT and WIDTH must be 1 to 32768, got ") + argv[2] + " and " + argv[3]);
  if (resize != "stretch" && resize != "letterbox") Fail("the fit must be stretch or letterbox, got " + resize);
  if (type != "uint8" && type != "float32") Fail("the type must be uint8 or float32, got " + type);
  const mess::Image fitted = mess::Fit(ReadPpm(argv[1]), height, width, resize == "letterbox");
  const std::vector<float> floats(fitted.rgb.begin(), fitted.rgb.end());
  std::ofstream file(argv[6], std::ios::binary);
  if (type == "uint8") {
    file.write(reinterpret_cast<const char*>(fitted.rgb.data()), static_cast<std::streamsize>(fitted.rgb.size()));
  } else {
    file.write(reinterpret_cast<const char*>(floats.data()), static_cast<std::streamsize>(floats.size() * sizeof(float)));
  }
  if (!file.flush()) Fail(std::string(argv[6]) + " cannot be written");
}

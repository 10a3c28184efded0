// Runs a bundle on images, each leaving at the first exit that is sure of it.
//
//   mess_runner cpu|gpu model.tflite exit1=118540,exit2=96210,final image.rgb mask.raw [image.rgb mask.raw ...]
//
// The exits in the order of manifest.json, each but the last with the confident pixels from which an image leaves there,
// ceil(theta_img * height * width). image.rgb: the image at the network's size, RGB in 0..255 of the type that the bundle takes, as mess_fit
// makes it; mask.raw: one byte per pixel. Prints one line per segment, with the time to its decision, and to the mask if the image leaves there.
//
// Every buffer is made once. What a segment makes, the next one reads from the same buffer, on a GPU in its memory; of an image the host
// writes the pixels, reads one number for each decision, and one mask.
//
// Built on the C API of LiteRT (litert_c.h), with DIR the folder of libLiteRt.so, where the GPU's library lies too:
//   g++ -std=c++17 -O2 mess_runner.cc -o mess_runner -L DIR -l:libLiteRt.so -Wl,-rpath,DIR

#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "litert_c.h"

namespace {

[[noreturn]] void Fail(const std::string& message) {
  std::cerr << "mess_runner: " << message << "\n";
  std::exit(1);
}

void Check(LiteRtStatus status, const std::string& what) {
  if (status != 0) Fail(what + " failed with status " + std::to_string(status));
}

void Write(LiteRtTensorBuffer buffer, const std::vector<char>& bytes) {
  size_t size;
  void* memory;
  Check(LiteRtGetTensorBufferPackedSize(buffer, &size), "size of the image");
  if (size != bytes.size()) Fail("the image must have " + std::to_string(size) + " bytes, got " + std::to_string(bytes.size()));
  Check(LiteRtLockTensorBuffer(buffer, &memory, kLockWrite), "lock");
  std::memcpy(memory, bytes.data(), size);
  Check(LiteRtUnlockTensorBuffer(buffer), "unlock");
}

std::vector<char> Read(LiteRtTensorBuffer buffer) {
  size_t size;
  void* memory;
  Check(LiteRtGetTensorBufferPackedSize(buffer, &size), "size of an output");
  Check(LiteRtLockTensorBuffer(buffer, &memory, kLockRead), "lock");
  std::vector<char> bytes(static_cast<char*>(memory), static_cast<char*>(memory) + size);
  Check(LiteRtUnlockTensorBuffer(buffer), "unlock");
  return bytes;
}

// One exit: its signature, and the confident pixels from which on images leave there; the last one asks for none.
struct Exit {
  std::string name;
  bool last;
  int32_t needed;
};

std::vector<Exit> ParseExits(const std::string& argument) {
  std::vector<Exit> exits;
  std::istringstream words(argument);
  for (std::string word; std::getline(words, word, ',');) {
    if (!exits.empty() && exits.back().last) Fail("only the last exit has no number of pixels, got " + argument);
    const size_t equals = word.find('=');
    const bool last = equals == std::string::npos;
    exits.push_back({word.substr(0, equals), last, last ? 0 : static_cast<int32_t>(std::atol(word.c_str() + equals + 1))});
  }
  if (exits.empty() || !exits.back().last) Fail("the last exit must be given without a number of pixels");
  return exits;
}

class Bundle {
 public:
  Bundle(const char* path, bool gpu, const std::vector<Exit>& exits) {
    // LiteRT looks for the GPU's library beside its own.
    Dl_info library;
    if (!dladdr(reinterpret_cast<void*>(&LiteRtCreateEnvironment), &library)) Fail("libLiteRt.so is not a shared library");
    const std::string file = library.dli_fname, folder = file.substr(0, file.find_last_of('/'));
    const LiteRtEnvOption option{kRuntimeLibraryDir, {kString, folder.c_str()}};
    Check(LiteRtCreateEnvironment(1, &option, &environment_), "environment");
    Check(LiteRtCreateModelFromFile(environment_, path, &model_), std::string("loading ") + path);
    LiteRtOptions options;
    Check(LiteRtCreateOptions(&options), "options");
    // On a GPU, what it cannot run stays on the CPU.
    Check(LiteRtSetOptionsHardwareAccelerators(options, gpu ? kHardwareGpu | kHardwareCpu : kHardwareCpu), "hardware");
    Check(LiteRtCreateCompiledModel(environment_, model_, options, &compiled_), gpu ? "compilation for a GPU" : "compilation");
    bool accelerated;
    Check(LiteRtCompiledModelIsNonCpuFullyAccelerated(compiled_, &accelerated), "acceleration");
    if (gpu && !accelerated) std::cerr << "mess_runner: not on a GPU alone: what it cannot run, or all of it, runs on the CPU\n";
    std::map<std::string, LiteRtTensorBuffer> tensors;
    for (const Exit& exit : exits) segments_.push_back(Prepare("segment." + exit.name, tensors));
    image_ = tensors.at("image");
  }

  void Take(const std::vector<char>& image) { Write(image_, image); }

  void Run(size_t index) {
    Segment& segment = segments_[index];
    Check(
        LiteRtRunCompiledModel(
            compiled_, segment.signature, segment.inputs.size(), segment.inputs.data(), segment.outputs.size(), segment.outputs.data()),
        "running segment " + std::to_string(index + 1));
  }

  int32_t ConfidentPixels(size_t index) const {
    int32_t count;
    std::memcpy(&count, Read(segments_[index].named.at("confident_pixels")).data(), sizeof(count));
    return count;
  }

  std::vector<char> Mask(size_t index) const { return Read(segments_[index].named.at("mask")); }

 private:
  struct Segment {
    size_t signature = 0;
    std::vector<LiteRtTensorBuffer> inputs, outputs;
    std::map<std::string, LiteRtTensorBuffer> named;  // the outputs
  };

  // Makes the buffers of a signature. Inputs are those that earlier ones have put into `tensors` by name, but for the image.
  Segment Prepare(const std::string& key, std::map<std::string, LiteRtTensorBuffer>& tensors) {
    Segment segment;
    LiteRtSignature signature = Find(key, &segment.signature);
    size_t count;
    const char* name;
    LiteRtTensor tensor;
    LiteRtTensorBufferRequirements requirements;
    Check(LiteRtGetNumSignatureInputs(signature, &count), "inputs");
    for (size_t i = 0; i < count; ++i) {
      Check(LiteRtGetSignatureInputName(signature, i, &name), "input name");
      if (std::strcmp(name, "image") == 0 && !tensors.count("image")) {
        Check(LiteRtGetSignatureInputTensorByIndex(signature, i, &tensor), "input");
        Check(LiteRtGetCompiledModelInputBufferRequirements(compiled_, segment.signature, i, &requirements), "input requirements");
        tensors["image"] = NewBuffer(tensor, requirements);
      }
      if (!tensors.count(name)) Fail(key + " reads " + name + ", which no segment before it makes");
      segment.inputs.push_back(tensors.at(name));
    }
    Check(LiteRtGetNumSignatureOutputs(signature, &count), "outputs");
    for (size_t i = 0; i < count; ++i) {
      Check(LiteRtGetSignatureOutputName(signature, i, &name), "output name");
      Check(LiteRtGetSignatureOutputTensorByIndex(signature, i, &tensor), "output");
      Check(LiteRtGetCompiledModelOutputBufferRequirements(compiled_, segment.signature, i, &requirements), "output requirements");
      segment.outputs.push_back(segment.named[name] = tensors[name] = NewBuffer(tensor, requirements));
    }
    return segment;
  }

  LiteRtSignature Find(const std::string& key, size_t* index) {
    size_t count;
    Check(LiteRtGetNumModelSignatures(model_, &count), "signatures");
    for (; *index < count; ++*index) {
      LiteRtSignature signature;
      const char* found;
      Check(LiteRtGetModelSignature(model_, *index, &signature), "signature");
      Check(LiteRtGetSignatureKey(signature, &found), "signature key");
      if (key == found) return signature;
    }
    Fail("the model has no signature " + key);
  }

  LiteRtTensorBuffer NewBuffer(LiteRtTensor tensor, LiteRtTensorBufferRequirements requirements) {
    LiteRtRankedTensorType type;
    LiteRtTensorBuffer buffer;
    Check(LiteRtGetRankedTensorType(tensor, &type), "tensor type");
    Check(LiteRtCreateManagedTensorBufferFromRequirements(environment_, &type, requirements, &buffer), "tensor buffer");
    return buffer;
  }

  LiteRtEnvironment environment_;
  LiteRtModel model_;
  LiteRtCompiledModel compiled_;
  LiteRtTensorBuffer image_;
  std::vector<Segment> segments_;
};
}  // namespace

int main(int argc, char** argv) {
  const std::string backend = argc > 1 ? argv[1] : "";
  if (argc < 6 || argc % 2 || (backend != "cpu" && backend != "gpu")) {
    Fail("usage: mess_runner cpu|gpu model.tflite EXIT=PIXELS,...,LAST_EXIT image.rgb mask.raw [image.rgb mask.raw ...]");
  }
  const std::vector<Exit> exits = ParseExits(argv[3]);
  Bundle bundle(argv[2], backend == "gpu", exits);
  for (int i = 4; i < argc; i += 2) {
    std::ifstream file(argv[i], std::ios::binary);
    bundle.Take(std::vector<char>(std::istreambuf_iterator<char>(file), {}));
    std::vector<char> mask;
    for (size_t index = 0; mask.empty(); ++index) {
      const Exit& exit = exits[index];
      const auto start = std::chrono::steady_clock::now();
      bundle.Run(index);
      const int32_t confident = exit.last ? 0 : bundle.ConfidentPixels(index);
      if (exit.last || confident >= exit.needed) mask = bundle.Mask(index);
      const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
      std::cout << exit.name << " " << spent.count() << " ms";
      if (!exit.last) std::cout << " confident_pixels " << confident;
      std::cout << (mask.empty() ? "" : " leaves") << std::endl;
    }
    if (!std::ofstream(argv[i + 1], std::ios::binary).write(mask.data(), static_cast<std::streamsize>(mask.size())).flush()) {
      Fail(std::string(argv[i + 1]) + " cannot be written");
    }
  }
}

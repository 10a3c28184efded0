// Runs a bundle on one image, leaving at the first exit that is sure of it.
//
//   mess_runner model.tflite image.rgb mask.raw exit1=118540 exit2=96210 final
//
// image.rgb: the image at the network's size, RGB in 0..255 of the type that the bundle takes, as mess_fit makes it; mask.raw: one byte per pixel. The exits
// follow in the order of manifest.json, each but the last with the confident pixels from which an image leaves there,
// ceil(theta_img * height * width). Prints one line per segment.
//
// Built on the C API of LiteRT (litert_c.h), with DIR the folder of libLiteRt.so:
//   g++ -std=c++17 -O2 mess_runner.cc -o mess_runner -L DIR -l:libLiteRt.so -Wl,-rpath,DIR

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
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

class Bundle {
 public:
  explicit Bundle(const char* path) {
    Check(LiteRtCreateEnvironment(0, nullptr, &environment_), "environment");
    Check(LiteRtCreateModelFromFile(environment_, path, &model_), std::string("loading ") + path);
    LiteRtOptions options;
    Check(LiteRtCreateOptions(&options), "options");
    Check(LiteRtSetOptionsHardwareAccelerators(options, kHardwareCpu), "hardware");
    Check(LiteRtCreateCompiledModel(environment_, model_, options, &compiled_), "compilation");
  }

  // Runs a signature. Inputs are found by name among `tensors`, outputs are put there: the next segment reads the same memory.
  void Run(const std::string& key, const std::vector<char>& image, std::map<std::string, LiteRtTensorBuffer>& tensors) {
    size_t index = 0, count;
    LiteRtSignature signature = Find(key, &index);
    std::vector<LiteRtTensorBuffer> inputs, outputs;
    const char* name;
    LiteRtTensor tensor;
    LiteRtTensorBufferRequirements requirements;
    Check(LiteRtGetNumSignatureInputs(signature, &count), "inputs");
    for (size_t i = 0; i < count; ++i) {
      Check(LiteRtGetSignatureInputName(signature, i, &name), "input name");
      if (std::strcmp(name, "image") == 0 && !tensors.count("image")) {
        Check(LiteRtGetSignatureInputTensorByIndex(signature, i, &tensor), "input");
        Check(LiteRtGetCompiledModelInputBufferRequirements(compiled_, index, i, &requirements), "input requirements");
        Write(tensors["image"] = NewBuffer(tensor, requirements), image);
      }
      inputs.push_back(tensors.at(name));
    }
    Check(LiteRtGetNumSignatureOutputs(signature, &count), "outputs");
    for (size_t i = 0; i < count; ++i) {
      Check(LiteRtGetSignatureOutputName(signature, i, &name), "output name");
      Check(LiteRtGetSignatureOutputTensorByIndex(signature, i, &tensor), "output");
      Check(LiteRtGetCompiledModelOutputBufferRequirements(compiled_, index, i, &requirements), "output requirements");
      outputs.push_back(tensors[name] = NewBuffer(tensor, requirements));
    }
    Check(LiteRtRunCompiledModel(compiled_, index, inputs.size(), inputs.data(), outputs.size(), outputs.data()), "running " + key);
  }

 private:
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
};
}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) Fail("usage: mess_runner model.tflite image.rgb mask.raw EXIT=PIXELS... LAST_EXIT");
  Bundle bundle(argv[1]);
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> image(std::istreambuf_iterator<char>(file), {});
  std::map<std::string, LiteRtTensorBuffer> tensors;
  for (int i = 4; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const auto start = std::chrono::steady_clock::now();
    bundle.Run("segment." + argument.substr(0, equals), image, tensors);
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
    std::cout << argument.substr(0, equals) << " " << spent.count() << " ms";
    bool leaves = equals == std::string::npos;
    if (!leaves) {
      int32_t confident;
      std::memcpy(&confident, Read(tensors["confident_pixels"]).data(), sizeof(confident));
      std::cout << " confident_pixels " << confident;
      leaves = confident >= std::stoi(argument.substr(equals + 1));
    }
    std::cout << (leaves ? " leaves" : "") << std::endl;
    if (!leaves) continue;
    const std::vector<char> mask = Read(tensors["mask"]);
    std::ofstream(argv[3], std::ios::binary).write(mask.data(), mask.size());
    return 0;
  }
  Fail("the last exit must be given without a number of pixels");
}

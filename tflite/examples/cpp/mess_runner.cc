// Runs a bundle on images, each leaving at the first exit that is sure of it.
//
//   mess_runner cpu|gpu model.tflite exit1=118540,exit2=96210,final image.rgb mask.raw [image.rgb mask.raw ...]
//
// The exits in the order of manifest.json, each but the last with the confident pixels from which an image leaves there,
// ceil(theta_img * height * width). image.rgb: the image at the network's size, RGB in 0..255 of the type that the bundle takes, as mess_fit
// makes it; mask.raw: one byte per pixel. Prints one line per segment, with the time to its decision, and to the mask if the image leaves there.
//
// A bundle with regions, whose cells leave each for itself, takes theta_img instead, and the budgets: exit1=0.9,exit2=0.9,final@32,64,128,256.
// The next segment works on the smallest budget that holds the cells that are not sure; the image leaves when there are none.
//
// Every buffer is made once. What a segment makes, the next one reads from the same buffer, on a GPU in its memory; of an image the host
// writes the pixels, reads one number for each decision, and one mask.
//
// Built on the C API of LiteRT (litert_c.h), with DIR the folder of libLiteRt.so, where the GPU's library lies too:
//   g++ -std=c++17 -O2 mess_runner.cc -o mess_runner -L DIR -l:libLiteRt.so -Wl,-rpath,DIR

#include <dlfcn.h>

#include <algorithm>
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

constexpr float kSureRounding = 1e-5f;  // a sum of as many floats as a cell has pixels

// One exit: its name, and the confident pixels, or of a cell their share, from which on images or cells leave there; the last asks for none.
struct Exit {
  std::string name;
  bool last;
  double needed;
};

// What stands behind the exits: numbers of cells, rising; none if images leave as a whole.
std::vector<size_t> ParseBudgets(const std::string& argument) {
  std::vector<size_t> budgets;
  const size_t at = argument.find('@');
  if (at == std::string::npos) return budgets;
  std::istringstream words(argument.substr(at + 1));
  for (std::string word; std::getline(words, word, ',');) {
    budgets.push_back(static_cast<size_t>(std::atol(word.c_str())));
    if (budgets.back() <= (budgets.size() > 1 ? budgets[budgets.size() - 2] : 0)) Fail("budgets must rise from above 0, got " + argument);
  }
  if (budgets.empty()) Fail("budgets must be given behind @, got " + argument);
  return budgets;
}

std::vector<Exit> ParseExits(const std::string& argument) {
  std::vector<Exit> exits;
  std::istringstream words(argument.substr(0, argument.find('@')));
  for (std::string word; std::getline(words, word, ',');) {
    if (!exits.empty() && exits.back().last) Fail("only the last exit has no number of pixels, got " + argument);
    const size_t equals = word.find('=');
    const bool last = equals == std::string::npos;
    exits.push_back({word.substr(0, equals), last, last ? 0 : std::atof(word.c_str() + equals + 1)});
  }
  if (exits.empty() || !exits.back().last) Fail("the last exit must be given without a number of pixels");
  return exits;
}

class Bundle {
 public:
  Bundle(const char* path, bool gpu, const std::vector<Exit>& exits, const std::vector<size_t>& budgets) {
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
    for (const Exit& exit : exits) {
      std::map<std::string, LiteRtTensorBuffer> made;
      std::vector<Segment> forms;
      if (budgets.empty() || segments_.empty()) {
        forms.push_back(Prepare("segment." + exit.name, tensors, made));
      } else {
        for (size_t budget : budgets) {
          const std::string key = "segment." + exit.name + "." + std::to_string(budget);
          size_t index;
          if (budget != budgets.back() && !Find(key, &index)) continue;  // a segment that can only be dense
          forms.push_back(Prepare(key, tensors, made));
          forms.back().budget = budget;
        }
      }
      for (const auto& [name, buffer] : made) tensors[name] = buffer;
      segments_.push_back(forms);
    }
    image_ = tensors.at("image");
  }

  void Take(const std::vector<char>& image) { Write(image_, image); }

  // Runs a segment on the smallest budget that holds so many cells; returns the budget, 0 without.
  size_t Run(size_t index, size_t cells) {
    size_t form = 0;
    while (segments_[index][form].budget < cells && form + 1 < segments_[index].size()) ++form;
    Segment& segment = segments_[index][form];
    Check(
        LiteRtRunCompiledModel(
            compiled_, segment.signature, segment.inputs.size(), segment.inputs.data(), segment.outputs.size(), segment.outputs.data()),
        "running segment " + std::to_string(index + 1));
    return segment.budget;
  }

  int32_t ConfidentPixels(size_t index) const {
    int32_t count;
    std::memcpy(&count, Read(Made(index, "confident_pixels")).data(), sizeof(count));
    return count;
  }

  // How many cells are less sure than that.
  size_t Unsure(size_t index, double needed) const {
    const std::vector<char> bytes = Read(Made(index, "sure"));
    std::vector<float> shares(bytes.size() / sizeof(float));
    std::memcpy(shares.data(), bytes.data(), bytes.size());
    const float least = static_cast<float>(needed) - kSureRounding;
    return static_cast<size_t>(std::count_if(shares.begin(), shares.end(), [least](float share) { return share < least; }));
  }

  std::vector<char> Mask(size_t index) const { return Read(Made(index, "mask")); }

 private:
  struct Segment {
    size_t signature = 0, budget = 0;
    std::vector<LiteRtTensorBuffer> inputs, outputs;
    std::map<std::string, LiteRtTensorBuffer> named;  // the outputs
  };

  // An output of a segment; at every budget it is the same buffer.
  LiteRtTensorBuffer Made(size_t index, const std::string& name) const {
    const auto& named = segments_[index].front().named;
    if (!named.count(name)) Fail("segment " + std::to_string(index + 1) + " makes no " + name + ": budgets are given with regions only");
    return named.at(name);
  }

  // Makes the buffers of a signature. Inputs are those that earlier ones have put into `tensors` by name, but for the image; outputs are put
  // into `made`, or taken from there.
  Segment Prepare(
      const std::string& key, std::map<std::string, LiteRtTensorBuffer>& tensors, std::map<std::string, LiteRtTensorBuffer>& made) {
    Segment segment;
    LiteRtSignature signature = Find(key, &segment.signature);
    if (!signature) Fail("the model has no signature " + key + " (with regions, budgets are given: EXITS@BUDGETS)");
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
      if (!made.count(name)) made[name] = NewBuffer(tensor, requirements);
      segment.outputs.push_back(segment.named[name] = made.at(name));
    }
    return segment;
  }

  // A signature and its number; null if there is none.
  LiteRtSignature Find(const std::string& key, size_t* index) {
    size_t count;
    Check(LiteRtGetNumModelSignatures(model_, &count), "signatures");
    for (*index = 0; *index < count; ++*index) {
      LiteRtSignature signature;
      const char* found;
      Check(LiteRtGetModelSignature(model_, *index, &signature), "signature");
      Check(LiteRtGetSignatureKey(signature, &found), "signature key");
      if (key == found) return signature;
    }
    return nullptr;
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
  std::vector<std::vector<Segment>> segments_;  // with regions, at every budget
};
}  // namespace

int main(int argc, char** argv) {
  const std::string backend = argc > 1 ? argv[1] : "";
  if (argc < 6 || argc % 2 || (backend != "cpu" && backend != "gpu")) {
    Fail("usage: mess_runner cpu|gpu model.tflite EXIT=PIXELS,...,LAST_EXIT image.rgb mask.raw [image.rgb mask.raw ...]");
  }
  const std::vector<Exit> exits = ParseExits(argv[3]);
  const std::vector<size_t> budgets = ParseBudgets(argv[3]);
  Bundle bundle(argv[2], backend == "gpu", exits, budgets);
  for (int i = 4; i < argc; i += 2) {
    std::ifstream file(argv[i], std::ios::binary);
    bundle.Take(std::vector<char>(std::istreambuf_iterator<char>(file), {}));
    std::vector<char> mask;
    size_t unsure = 0;  // cells
    for (size_t index = 0; mask.empty(); ++index) {
      const Exit& exit = exits[index];
      const auto start = std::chrono::steady_clock::now();
      const size_t budget = bundle.Run(index, unsure);
      int32_t confident = 0;
      if (!exit.last && budgets.empty()) confident = bundle.ConfidentPixels(index);
      if (!exit.last && !budgets.empty()) unsure = bundle.Unsure(index, exit.needed);
      if (exit.last || (budgets.empty() ? confident >= exit.needed : unsure == 0)) mask = bundle.Mask(index);
      const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
      std::cout << exit.name << " " << spent.count() << " ms";
      if (budget) std::cout << " budget " << budget;
      if (!exit.last && budgets.empty()) std::cout << " confident_pixels " << confident;
      if (!exit.last && !budgets.empty()) std::cout << " unsure " << unsure;
      std::cout << (mask.empty() ? "" : " leaves") << std::endl;
    }
    if (!std::ofstream(argv[i + 1], std::ios::binary).write(mask.data(), static_cast<std::streamsize>(mask.size())).flush()) {
      Fail(std::string(argv[i + 1]) + " cannot be written");
    }
  }
}

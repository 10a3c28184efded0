// Runs a bundle on images, each leaving at the first exit that is sure of it.
//
//   mess_runner cpu|gpu model.tflite exit1=118540,exit2=96210,final image.rgb mask.raw [image.rgb mask.raw ...]
//
// The exits in the order of manifest.json, each but the last with the confident pixels from which an image leaves there,
// ceil(theta_img * height * width). image.rgb: the image at the network's size, RGB in 0..255 of the type that the bundle takes, as mess_fit
// makes it; mask.raw: one byte per pixel. manifest.json lies beside model.tflite, which must have the size that it says, as LiteRT crashes at a
// file that ends too early. Prints one line per segment, with the time to its decision, and to the mask if the image leaves there.
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
#include <cmath>
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

// What is needed of the manifest beside a model: the model's size, and how many classes there are, of which each has a colour.
struct Manifest {
  size_t size_bytes = 0, classes = 0;
};

Manifest ReadManifest(const std::string& model) {
  const std::string path = model.substr(0, model.find_last_of('/') + 1) + "manifest.json";
  std::ifstream file(path, std::ios::binary);
  if (!file) Fail(path + " must lie beside the model");
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  const auto behind = [&](const std::string& key) {
    const size_t at = text.find("\"" + key + "\":");
    if (at == std::string::npos) Fail(path + " must hold " + key);
    return at + key.size() + 3;
  };
  Manifest manifest;
  manifest.size_bytes = std::strtoull(text.c_str() + behind("size_bytes"), nullptr, 10);
  int depth = 0;  // of lists: the palette's is 1, a colour's 2
  for (size_t at = text.find('[', behind("palette")); at < text.size(); ++at) {
    if (text[at] == '[' && ++depth == 2) ++manifest.classes;
    if (text[at] == ']' && --depth == 0) break;
  }
  return manifest;
}

void CheckSize(const std::string& model, const Manifest& manifest) {
  std::ifstream file(model, std::ios::binary | std::ios::ate);
  const size_t size = static_cast<size_t>(file.tellg());
  if (size != manifest.size_bytes) {
    Fail(model + " must have " + std::to_string(manifest.size_bytes) + " bytes, as manifest.json says, got " + std::to_string(size));
  }
}

void CheckMask(const std::vector<char>& mask, const std::string& exit, const Manifest& manifest) {
  size_t top = 0;
  for (const char value : mask) top = std::max<size_t>(top, static_cast<unsigned char>(value));
  if (top >= manifest.classes) {  // of values that are not finite there may be no class
    Fail("the mask of " + exit + " must be of classes 0 to " + std::to_string(manifest.classes - 1) + ", got " + std::to_string(top));
  }
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

// A number from 0 on that is all of a text, or -1.
double Number(const std::string& text) {
  char* end;
  const double value = std::strtod(text.c_str(), &end);
  const bool digits = !text.empty() && text.find_first_not_of("0123456789.e-") == std::string::npos;
  return digits && *end == 0 && value >= 0 ? value : -1;
}

bool Whole(double number) { return number >= 0 && number <= 1e9 && number == std::floor(number); }

// What stands behind the exits: numbers of cells, rising; none if images leave as a whole.
std::vector<size_t> ParseBudgets(const std::string& argument) {
  std::vector<size_t> budgets;
  const size_t at = argument.find('@');
  if (at == std::string::npos) return budgets;
  std::istringstream words(argument.substr(at + 1));
  for (std::string word; std::getline(words, word, ',');) {
    const double budget = Number(word);
    if (!Whole(budget)) Fail("budgets must be whole numbers of cells, got " + word + " in " + argument);
    budgets.push_back(static_cast<size_t>(budget));
    if (budgets.back() <= (budgets.size() > 1 ? budgets[budgets.size() - 2] : 0)) Fail("budgets must rise from above 0, got " + argument);
  }
  if (budgets.empty()) Fail("budgets must be given behind @, got " + argument);
  return budgets;
}

std::vector<Exit> ParseExits(const std::string& argument) {
  std::vector<Exit> exits;
  const bool cells = argument.find('@') != std::string::npos;
  std::istringstream words(argument.substr(0, argument.find('@')));
  for (std::string word; std::getline(words, word, ',');) {
    if (!exits.empty() && exits.back().last) Fail("only the last exit has no number of pixels, got " + argument);
    const size_t equals = word.find('=');
    const bool last = equals == std::string::npos;
    const double needed = last ? 0 : Number(word.substr(equals + 1));
    if (cells ? needed < 0 : !Whole(needed)) {
      Fail(word.substr(0, equals) + " must be given " + (cells ? "a share of pixels" : "a whole number of pixels") + ", got " + word);
    }
    exits.push_back({word.substr(0, equals), last, needed});
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
  if (!std::ifstream(argv[2])) Fail(std::string("loading ") + argv[2] + " failed: it cannot be read");
  const Manifest manifest = ReadManifest(argv[2]);
  CheckSize(argv[2], manifest);
  Bundle bundle(argv[2], backend == "gpu", exits, budgets);
  for (int i = 4; i < argc; i += 2) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) Fail(std::string(argv[i]) + " cannot be read");
    bundle.Take(std::vector<char>(std::istreambuf_iterator<char>(file), {}));
    std::vector<char> mask;
    std::string left;
    size_t unsure = 0;  // cells
    for (size_t index = 0; mask.empty(); ++index) {
      const Exit& exit = exits[index];
      left = exit.name;
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
    CheckMask(mask, left, manifest);
    if (!std::ofstream(argv[i + 1], std::ios::binary).write(mask.data(), static_cast<std::streamsize>(mask.size())).flush()) {
      Fail(std::string(argv[i + 1]) + " cannot be written");
    }
  }
}

// A talking video without Python: runs the packages of `kinora export aoti` on the stream beside them.
//
//     kinora_stream FOLDER [cpu|cuda] [TOLERANCE]
//
// Each block of the stream is denoised by step.pt2, once for every noise level and with a ring of keys and values for
// each of them, and decoded by decode.pt2. Both results are compared with what PyTorch made of the same stream; the
// exit code is 0 when their relative L2 errors are at most TOLERANCE (1e-5), 1 when not, 2 when something cannot be
// used.

#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

namespace {

using torch::Tensor;
using Tensors = std::map<std::string, Tensor>;

// One tensor that a package takes or returns, as a line of its metadata tells: "x float32 1 16 3 24 24".
struct Argument {
  std::string name;
  torch::ScalarType dtype;
  std::vector<int64_t> shape;
};

torch::ScalarType dtype_named(const std::string& name) {
  static const std::map<std::string, torch::ScalarType> known = {
      {"float32", torch::kFloat32}, {"bfloat16", torch::kBFloat16}, {"float16", torch::kFloat16},
      {"int64", torch::kInt64},     {"int32", torch::kInt32},
  };
  const auto found = known.find(name);
  if (found == known.end()) {
    throw std::runtime_error("a package takes tensors of " + name + ", which this program does not know");
  }
  return found->second;
}

std::vector<Argument> arguments(const std::string& table) {
  std::vector<Argument> found;
  std::istringstream lines(table);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name, dtype;
    words >> name >> dtype;
    std::vector<int64_t> shape{std::istream_iterator<int64_t>(words), {}};
    found.push_back({name, dtype_named(dtype), std::move(shape)});
  }
  return found;
}

// A package, called with tensors by name.
class Package {
 public:
  Package(const std::filesystem::path& path, torch::Device device) : loader_(path.string()), device_(device) {
    const auto metadata = loader_.get_metadata();
    inputs_ = arguments(metadata.at("inputs"));
    outputs_ = arguments(metadata.at("outputs"));
  }

  const std::vector<Argument>& inputs() const { return inputs_; }
  const std::vector<Argument>& outputs() const { return outputs_; }

  // The given tensors, of which the package may write into some; every input must be among them.
  Tensors operator()(const Tensors& given) {
    std::vector<Tensor> values;
    for (const auto& input : inputs_) {
      const auto found = given.find(input.name);
      if (found == given.end()) {
        throw std::runtime_error("the stream has no tensor " + input.name + ", which the package takes");
      }
      const Tensor& value = found->second;
      if (value.scalar_type() != input.dtype || value.sizes() != torch::IntArrayRef(input.shape) ||
          value.device().type() != device_.type() || !value.is_contiguous()) {
        throw std::runtime_error("tensor " + input.name + " has another shape, dtype or device than the package takes");
      }
      values.push_back(value);
    }
    const auto results = loader_.run(values);
    Tensors named;
    for (size_t i = 0; i < outputs_.size(); ++i) {
      named[outputs_[i].name] = results.at(i);
    }
    return named;
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
  torch::Device device_;
  std::vector<Argument> inputs_, outputs_;
};

// Every tensor of a file that Python wrote with torch.save.
Tensors read_tensors(const std::filesystem::path& path, torch::Device device) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error(path.string() + " cannot be read; export with `kinora export aoti`");
  }
  std::vector<char> bytes(std::filesystem::file_size(path));
  file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  Tensors found;
  for (const auto& item : torch::pickle_load(bytes).toGenericDict()) {
    found[item.key().toStringRef()] = item.value().toTensor().to(device);
  }
  return found;
}

// The memory of one denoising step: zeros for every "rings.*" that the package takes.
Tensors empty_rings(const Package& step, torch::Device device) {
  Tensors rings;
  for (const auto& input : step.inputs()) {
    if (input.name.rfind("rings.", 0) == 0) {
      rings[input.name] = torch::zeros(input.shape, torch::dtype(input.dtype).device(device));
    }
  }
  return rings;
}

// A package wants its inputs aligned, which a row inside another tensor need not be, so the row gets its own memory.
Tensor row(const Tensors& stream, const std::string& name, int64_t index) {
  return stream.at(name).select(0, index).clone();
}

// x + (sigma_next - sigma) * flow, rounded as `runtime/samplers/euler.py` rounds it.
Tensor euler_step(const Tensor& x, const Tensor& flow, const Tensor& sigma, const Tensor& sigma_next) {
  return (x.to(torch::kFloat32) + (sigma_next - sigma).to(flow.scalar_type()) * flow).to(x.scalar_type());
}

double relative_error(const Tensor& found, const Tensor& wanted) {
  const Tensor exact = wanted.to(torch::kFloat64);
  return ((found.to(torch::kFloat64) - exact).norm() / exact.norm()).item<double>();
}

// Wall time of a call, waiting for the device.
template <typename Function>
double seconds(torch::Device device, Function&& function) {
  const auto wait = [&] {
    if (device.is_cuda()) torch::cuda::synchronize();
  };
  wait();
  const auto start = std::chrono::steady_clock::now();
  function();
  wait();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

bool told(const char* what, double error, double tolerance) {
  std::printf("%s: relative error %.2e (tolerance %.0e)\n", what, error, tolerance);
  return error <= tolerance;  // false for NaN
}

// Denoises every block from its noise; [blocks, 1, 16, F, h, w].
Tensor denoise(Package& step, const Tensors& stream, torch::Device device) {
  const Tensor& noise = stream.at("noise");
  const int64_t steps = stream.at("timesteps").size(0);
  std::vector<Tensors> rings;  // every noise level remembers its own past
  for (int64_t s = 0; s < steps; ++s) rings.push_back(empty_rings(step, device));

  std::vector<Tensor> latents;
  for (int64_t block = 0; block < noise.size(0); ++block) {
    Tensor x = row(stream, "noise", block);
    const double taken = seconds(device, [&] {
      for (int64_t s = 0; s < steps; ++s) {
        Tensors given = stream;
        given.insert(rings[s].begin(), rings[s].end());
        given["x"] = x;
        given["audio"] = row(stream, "audio", block);
        given["block"] = torch::full({1}, block, torch::dtype(torch::kInt64).device(device));
        given["timestep"] = row(stream, "timesteps", s).reshape({1});
        given["distance"] = row(stream, "distances", block).slice(0, s, s + 1).clone();
        const Tensor flow = step(given).at("flow");
        x = euler_step(x, flow, stream.at("sigmas")[s], stream.at("sigmas")[s + 1]);
      }
    });
    latents.push_back(x);
    std::printf("block %ld: %ld steps in %.1f ms\n", static_cast<long>(block), static_cast<long>(steps), 1e3 * taken);
  }
  return torch::stack(latents);
}

// Decodes every block of latents; frames [blocks, 1, 3, T, H, W] in [-1, 1].
Tensor decode(Package& decoder, const Tensors& stream, const Tensor& latents, torch::Device device) {
  std::vector<Tensor> frames;
  Tensors state = stream;  // holds the slots, which every call replaces
  for (int64_t block = 0; block < latents.size(0); ++block) {
    Tensors results;
    const double taken = seconds(device, [&] {
      state["latents"] = latents.select(0, block).contiguous();
      results = decoder(state);
    });
    frames.push_back(results.at("frames"));
    results.erase("frames");
    for (auto& [name, slot] : results) state[name] = slot;
    std::printf("block %ld: decoded in %.1f ms\n", static_cast<long>(block), 1e3 * taken);
  }
  return torch::stack(frames);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::fprintf(stderr, "usage: %s FOLDER [cpu|cuda] [TOLERANCE]\n", argv[0]);
    return 2;
  }
  try {
    const std::filesystem::path folder = argv[1];
    const torch::Device device(argc > 2 ? argv[2] : "cpu");
    const double tolerance = argc > 3 ? std::stod(argv[3]) : 1e-5;
    torch::InferenceMode inference;

    const Tensors stream = read_tensors(folder / "stream.pt", device);
    Package step(folder / "step.pt2", device), decoder(folder / "decode.pt2", device);
    const Tensor latents = denoise(step, stream, device);
    const Tensor frames = decode(decoder, stream, latents, device);
    const bool same_latents = told("latents", relative_error(latents, stream.at("latents")), tolerance);
    const bool same_frames = told("frames", relative_error(frames, stream.at("frames")), tolerance);
    return same_latents && same_frames ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kinora_stream: %s\n", error.what());
    return 2;
  }
}

// Rotary frequencies with the scalings that leave attention itself alone.
#pragma once

#include <cstdint>
#include <vector>

namespace lorikeet {

// theta^(-2i / head_dim) for i in [0, head_dim / 2) (Su et al. 2021, RoFormer).
std::vector<float> RopeInverseFrequencies(int32_t head_dim, float theta);

// Position interpolation (Chen et al. 2023): positions count 1 / factor.
void ScaleRopeLinear(float factor, std::vector<float>& inverse_frequencies);

// Llama 3.1: long waves are interpolated, short ones kept, those between blended.
struct Llama3Scaling {
  float factor = 8.0f;
  float low_freq_factor = 1.0f;
  float high_freq_factor = 4.0f;
  float original_context = 8192;
};
void ScaleRopeLlama3(const Llama3Scaling& scaling, std::vector<float>& inverse_frequencies);

}  // namespace lorikeet

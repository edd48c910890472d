#include "engine/model/config_rope.h"

#include <cmath>
#include <numbers>

namespace lorikeet {

// The roundings to float stand where Transformers has them: at position 100,000 an angle of the
// fastest pair moves by 0.01 radians for every unit in the last place of its frequency.
std::vector<float> RopeInverseFrequencies(int32_t head_dim, float theta) {
  std::vector<float> frequencies(head_dim / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    frequencies[i] = 1.0f / static_cast<float>(std::pow(double{theta}, double{exponent}));
  }
  return frequencies;
}

void ScaleRopeLinear(float factor, std::vector<float>& inverse_frequencies) {
  for (float& frequency : inverse_frequencies) frequency /= factor;
}

void ScaleRopeLlama3(const Llama3Scaling& scaling, std::vector<float>& inverse_frequencies) {
  const float longest_kept = scaling.original_context / scaling.high_freq_factor;
  const float shortest_scaled = scaling.original_context / scaling.low_freq_factor;
  for (float& frequency : inverse_frequencies) {
    const float wavelength = static_cast<float>(2 * std::numbers::pi) / frequency;
    if (wavelength < longest_kept) continue;
    if (wavelength > shortest_scaled) {
      frequency /= scaling.factor;
      continue;
    }
    const float kept = (scaling.original_context / wavelength - scaling.low_freq_factor) /
                       (scaling.high_freq_factor - scaling.low_freq_factor);
    frequency = (1 - kept) * frequency / scaling.factor + kept * frequency;
  }
}

}  // namespace lorikeet

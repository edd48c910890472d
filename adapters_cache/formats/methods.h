// One lowering a method: from the tensors PEFT saves to the parts of Lowered. Where they are defined
// says the paper.
#pragma once

#include "absl/status/status.h"
#include "adapters_cache/formats/lowered.h"
#include "adapters_cache/formats/module_tensors.h"

namespace lorikeet {

// methods_lora.cc: PiSSA, OLoRA, KaSA, BD-LoRA, QALoRA, LoRA-XS
absl::Status LowerLoraRelative(const ModuleTensors& m, Lowered* out);

// methods_low_rank.cc
absl::Status LowerAdaLora(const ModuleTensors& m, Lowered* out);
absl::Status LowerDelora(const ModuleTensors& m, Lowered* out);
absl::Status LowerGralora(const ModuleTensors& m, Lowered* out);
absl::Status LowerLoha(const ModuleTensors& m, Lowered* out);
absl::Status LowerLoretta(const ModuleTensors& m, Lowered* out);
absl::Status LowerMiss(const ModuleTensors& m, Lowered* out);
absl::Status LowerPoly(const ModuleTensors& m, Lowered* out);
absl::Status LowerRandLora(const ModuleTensors& m, Lowered* out);
absl::Status LowerTiedLora(const ModuleTensors& m, Lowered* out);
absl::Status LowerTinyLora(const ModuleTensors& m, Lowered* out);
absl::Status LowerUniLora(const ModuleTensors& m, Lowered* out);
absl::Status LowerVbLora(const ModuleTensors& m, Lowered* out);
absl::Status LowerVera(const ModuleTensors& m, Lowered* out);

// methods_of_weight.cc: the delta depends on the base's weight
absl::Status LowerDeft(const ModuleTensors& m, Lowered* out);
absl::Status LowerFrod(const ModuleTensors& m, Lowered* out);
absl::Status LowerGlora(const ModuleTensors& m, Lowered* out);
absl::Status LowerHira(const ModuleTensors& m, Lowered* out);
absl::Status LowerHra(const ModuleTensors& m, Lowered* out);
absl::Status LowerOsf(const ModuleTensors& m, Lowered* out);
absl::Status LowerPeanut(const ModuleTensors& m, Lowered* out);

// methods_structured.cc: vectors, rotations, structured and sparse deltas
absl::Status LowerBeft(const ModuleTensors& m, Lowered* out);
absl::Status LowerBoft(const ModuleTensors& m, Lowered* out);
absl::Status LowerC3a(const ModuleTensors& m, Lowered* out);
absl::Status LowerIa3(const ModuleTensors& m, Lowered* out);
absl::Status LowerLokr(const ModuleTensors& m, Lowered* out);
absl::Status LowerOft(const ModuleTensors& m, Lowered* out);
absl::Status LowerRoad(const ModuleTensors& m, Lowered* out);

// methods_spectral.cc: values at random or trained places
absl::Status LowerFourierFt(const ModuleTensors& m, Lowered* out);
absl::Status LowerShira(const ModuleTensors& m, Lowered* out);
absl::Status LowerSuperTuning(const ModuleTensors& m, Lowered* out);
absl::Status LowerWaveFt(const ModuleTensors& m, Lowered* out);

}  // namespace lorikeet

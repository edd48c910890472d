lorikeet_test(tensor_test
  ${PROJECT_SOURCE_DIR}/tests/unit/tensor_dequantize_test.cc
  ${PROJECT_SOURCE_DIR}/tests/unit/tensor_gguf_test.cc
  ${PROJECT_SOURCE_DIR}/tests/unit/tensor_safetensors_test.cc
  LIBS lorikeet_tensor)

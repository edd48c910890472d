lorikeet_test(tensor_test
  ${PROJECT_SOURCE_DIR}/tests/unit/tensor_dequantize_test.cc
  ${PROJECT_SOURCE_DIR}/tests/unit/tensor_gguf_test.cc
  ${PROJECT_SOURCE_DIR}/tests/unit/tensor_safetensors_test.cc
  LIBS lorikeet_tensor)

lorikeet_test(model_source_test
  ${PROJECT_SOURCE_DIR}/tests/unit/model_source_config_test.cc
  ${PROJECT_SOURCE_DIR}/tests/unit/model_source_fp8_test.cc
  ${PROJECT_SOURCE_DIR}/tests/unit/model_source_nf4_test.cc
  ${PROJECT_SOURCE_DIR}/tests/unit/model_source_test.cc
  LIBS lorikeet_model lorikeet_tensor)

add_library(parser_properties STATIC ${PROJECT_SOURCE_DIR}/tests/fuzz/parsers.cc)
target_include_directories(parser_properties PUBLIC ${PROJECT_SOURCE_DIR})
target_link_libraries(parser_properties PUBLIC lorikeet_model lorikeet_tensor)

lorikeet_test(mutation_test ${PROJECT_SOURCE_DIR}/tests/fuzz/mutation_test.cc
  LIBS parser_properties)

add_library(adapter_properties STATIC ${PROJECT_SOURCE_DIR}/tests/fuzz/adapters.cc)
target_link_libraries(adapter_properties PUBLIC lorikeet_adapters_cache lorikeet_model)
lorikeet_test(adapter_mutation_test ${PROJECT_SOURCE_DIR}/tests/fuzz/adapter_mutation_test.cc
  LIBS adapter_properties)

if(TARGET lorikeet_server)
  add_library(request_properties STATIC ${PROJECT_SOURCE_DIR}/tests/fuzz/requests.cc)
  target_link_libraries(request_properties PUBLIC lorikeet_server GTest::gtest)
  lorikeet_test(request_mutation_test ${PROJECT_SOURCE_DIR}/tests/fuzz/request_mutation_test.cc
    LIBS request_properties)
endif()

# With clang: the preset `fuzz`, and tests/fuzz/run, which runs all of these.
if(CMAKE_CXX_COMPILER_ID MATCHES Clang AND LORIKEET_SANITIZE STREQUAL "address")
  foreach(instrumented parser_properties lorikeet_tensor lorikeet_model)
    target_compile_options(${instrumented} PRIVATE -fsanitize=fuzzer-no-link)
  endforeach()
  foreach(parser safetensors gguf hf_config)
    add_executable(${parser}_fuzz ${PROJECT_SOURCE_DIR}/tests/fuzz/${parser}_fuzz.cc)
    target_link_libraries(${parser}_fuzz PRIVATE parser_properties -fsanitize=fuzzer)
  endforeach()
  if(TARGET lorikeet_server)
    foreach(instrumented request_properties lorikeet_server)
      target_compile_options(${instrumented} PRIVATE -fsanitize=fuzzer-no-link)
    endforeach()
    foreach(reader request_body query keys tool_calls http)
      add_executable(${reader}_fuzz ${PROJECT_SOURCE_DIR}/tests/fuzz/${reader}_fuzz.cc)
      target_link_libraries(${reader}_fuzz PRIVATE request_properties -fsanitize=fuzzer)
    endforeach()
  endif()
  foreach(instrumented adapter_properties lorikeet_adapters_cache lorikeet_adapter_formats)
    target_compile_options(${instrumented} PRIVATE -fsanitize=fuzzer-no-link)
  endforeach()
  add_executable(adapter_fuzz ${PROJECT_SOURCE_DIR}/tests/fuzz/adapter_fuzz.cc)
  target_link_libraries(adapter_fuzz PRIVATE adapter_properties -fsanitize=fuzzer)

  add_custom_target(fuzz_targets DEPENDS safetensors_fuzz gguf_fuzz hf_config_fuzz adapter_fuzz)
  if(TARGET lorikeet_server)
    add_dependencies(fuzz_targets request_body_fuzz query_fuzz keys_fuzz tool_calls_fuzz http_fuzz)
  endif()
endif()

# Targets whose seeds are made of the goldens (seeds.h), and every target's corpus as plain tests.
if(TARGET lorikeet_server)
  add_library(text_properties STATIC ${PROJECT_SOURCE_DIR}/tests/fuzz/texts.cc)
  target_link_libraries(text_properties PUBLIC lorikeet_server_text)

  lorikeet_test(corpus_test ${PROJECT_SOURCE_DIR}/tests/fuzz/corpus_test.cc
    ${PROJECT_SOURCE_DIR}/tests/fuzz/seeds.cc
    LIBS parser_properties adapter_properties request_properties text_properties)

  add_executable(write_seeds ${PROJECT_SOURCE_DIR}/tests/fuzz/write_seeds.cc
    ${PROJECT_SOURCE_DIR}/tests/fuzz/seeds.cc)
  target_include_directories(write_seeds PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(write_seeds PRIVATE nlohmann_json::nlohmann_json)

  if(CMAKE_CXX_COMPILER_ID MATCHES Clang AND LORIKEET_SANITIZE STREQUAL "address")
    foreach(instrumented text_properties lorikeet_server_text)
      target_compile_options(${instrumented} PRIVATE -fsanitize=fuzzer-no-link)
    endforeach()
    add_executable(checkpoint_fuzz ${PROJECT_SOURCE_DIR}/tests/fuzz/checkpoint_fuzz.cc)
    target_link_libraries(checkpoint_fuzz PRIVATE parser_properties -fsanitize=fuzzer)
    add_executable(text_fuzz ${PROJECT_SOURCE_DIR}/tests/fuzz/text_fuzz.cc)
    target_link_libraries(text_fuzz PRIVATE text_properties -fsanitize=fuzzer)
    if(TARGET fuzz_targets)
      add_dependencies(fuzz_targets checkpoint_fuzz text_fuzz write_seeds)
    endif()
  endif()
endif()

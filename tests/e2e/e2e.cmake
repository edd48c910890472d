# The service in this process, over real gRPC and HTTP.
if(TARGET lorikeet_server)
  add_library(service_fixture STATIC ${CMAKE_CURRENT_LIST_DIR}/service_fixture.cc)
  target_link_libraries(service_fixture PUBLIC lorikeet_server OpenSSL::SSL GTest::gmock
                        GTest::gtest)
  foreach(test generation mixed adapters adapter_text bad_input lifecycle openai embeddings http form auth tls rest metrics
          tools inference tracing slow_disk)
    lorikeet_test(e2e_${test}_test ${CMAKE_CURRENT_LIST_DIR}/${test}_test.cc
                  LIBS service_fixture LABELS e2e)
  endforeach()
endif()

# The built program in processes of its own.
if(TARGET lorikeet)
  lorikeet_test(e2e_binary_test ${CMAKE_CURRENT_LIST_DIR}/binary_test.cc
                LIBS absl::strings nlohmann_json::nlohmann_json OpenSSL::SSL LABELS e2e)
  foreach(test e2e_binary_test e2e_adapter_text_test)
    target_compile_definitions(${test} PRIVATE LORIKEET_BINARY="$<TARGET_FILE:lorikeet>")
    add_dependencies(${test} lorikeet)
  endforeach()
endif()

if(TARGET lorikeet_server)
  foreach(test server_config auth metrics tracing with_text)
    lorikeet_test(${test}_test ${CMAKE_CURRENT_LIST_DIR}/${test}_test.cc
                  LIBS lorikeet_server GTest::gmock prometheus-cpp::core)
  endforeach()
  foreach(test sources uploads)
    lorikeet_test(${test}_test ${CMAKE_CURRENT_LIST_DIR}/${test}_test.cc
                  ${CMAKE_CURRENT_LIST_DIR}/adapters_support.cc LIBS lorikeet_server)
  endforeach()
endif()

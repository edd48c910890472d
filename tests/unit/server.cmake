if(TARGET lorikeet_server)
  lorikeet_test(server_config_test ${CMAKE_CURRENT_LIST_DIR}/server_config_test.cc
                LIBS lorikeet_server)
  lorikeet_test(metrics_test ${CMAKE_CURRENT_LIST_DIR}/metrics_test.cc
                LIBS lorikeet_server prometheus-cpp::core)
endif()

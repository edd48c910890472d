if(TARGET lorikeet_server)
  lorikeet_test(server_config_test ${CMAKE_CURRENT_LIST_DIR}/server_config_test.cc
                LIBS lorikeet_server)
  lorikeet_test(sources_test ${CMAKE_CURRENT_LIST_DIR}/sources_test.cc
                ${CMAKE_CURRENT_LIST_DIR}/adapters_support.cc LIBS lorikeet_server)
endif()

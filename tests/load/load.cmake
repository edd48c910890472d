# Programs that load the fronts; not tests.
if(TARGET lorikeet_server)
  add_executable(front_load EXCLUDE_FROM_ALL ${CMAKE_CURRENT_LIST_DIR}/front_load.cc)
  target_include_directories(front_load PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(front_load PRIVATE lorikeet_server)
endif()

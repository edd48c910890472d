# The README names tests of the whole build.
if(TARGET lorikeet_server)
  lorikeet_test(tidy_test
    ${PROJECT_SOURCE_DIR}/tests/tidy/rules.cc
    ${PROJECT_SOURCE_DIR}/tests/tidy/tidy_test.cc)
  target_compile_definitions(tidy_test PRIVATE
    LORIKEET_CTEST="${CMAKE_CTEST_COMMAND}" LORIKEET_BUILD="${PROJECT_BINARY_DIR}")
endif()

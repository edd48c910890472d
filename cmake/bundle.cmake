# The target `bundle`: build/<preset>/bundle holds the programs and, in lib/, what they need beyond a
# C++ runtime and cuBLAS, which a machine with CUDA has; bundle.tar.gz beside it is that folder. They
# run on any Linux whose C library is not older than this one's.

# The old kind of run path (RPATH) is inherited by the libraries, which bring others along.
add_link_options(-Wl,--disable-new-dtags)
set(CMAKE_INSTALL_MESSAGE NEVER)
set(CMAKE_INSTALL_RPATH "$ORIGIN/lib;/usr/local/cuda/lib64")

add_custom_target(bundle
  COMMAND ${CMAKE_COMMAND} -E rm -rf bundle
  COMMAND ${CMAKE_COMMAND} --install . --prefix bundle --strip
  COMMAND ${CMAKE_COMMAND} -E tar czf bundle.tar.gz bundle
  WORKING_DIRECTORY ${CMAKE_BINARY_DIR}
  COMMENT "Collecting ${CMAKE_BINARY_DIR}/bundle")

install(RUNTIME_DEPENDENCY_SET bundle DESTINATION lib
  PRE_EXCLUDE_REGEXES "^ld-linux" "^lib(c|m|gcc_s|stdc\\+\\+|cublas|cublasLt)\\.so")

# lorikeet_bundle(target): the program belongs to it.
function(lorikeet_bundle target)
  install(TARGETS ${target} RUNTIME_DEPENDENCY_SET bundle RUNTIME DESTINATION .)
  add_dependencies(bundle ${target})
endfunction()

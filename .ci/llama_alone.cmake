# CMake reads this at the end of llama.cpp's project(): its common library, which only its own programs use, is left out.
# llama-cpp-python sets the cache's variable, which this one hides.
set(LLAMA_BUILD_COMMON OFF)
# Its products for tiny models are none that take long; what searches for codebooks' entries is C.
set(CMAKE_CXX_FLAGS_RELEASE "-O1 -DNDEBUG")

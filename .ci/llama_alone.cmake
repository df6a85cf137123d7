# CMake reads this at the end of llama.cpp's project(): its common library, which only its own programs use, is left out.
# llama-cpp-python sets the cache's variable, which this one hides.
set(LLAMA_BUILD_COMMON OFF)

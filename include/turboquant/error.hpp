// Errors the library throws. User errors and corrupt data are exceptions; broken invariants are
// asserts; CUDA launchers return cudaError_t and never throw.
#pragma once

#include <stdexcept>
#include <string>

namespace turboquant {

// A caller's argument is wrong. The message names the argument, what was expected (with the
// supported set where there is one) and what was given. Python sees ValueError.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// Stored data is damaged, hostile or of an unknown version. The message names field and offset.
class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Reading or writing a file failed.
class IoError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A CUDA call failed where an owning class had to make it.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

[[noreturn]] inline void throw_invalid(const std::string& argument, const std::string& expected,
                                       const std::string& actual) {
  throw InvalidArgument(argument + ": expected " + expected + ", got " + actual);
}

}  // namespace detail
}  // namespace turboquant

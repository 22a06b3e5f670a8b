// A rung of the ladder on its own, to step through in a debugger. From the root of the repository:
//   g++ -std=c++17 -g -O0 -DMINIREFT_EMULATOR -DRUNG='"v4_rows_share_weights.cu"' tutorials/kernels/step.cpp -o build/step && gdb build/step
// You should see one number; tutorial 12 shows a session.
#include <cstdio>
#include <vector>

#include RUNG

int main() {
  constexpr int N = 4, C = 1024, r = 8;
  std::vector<float> h(N * C, 1), down(r * C, 0.5f), up(r * C, 2), bias(r, 1), out(N * C);
  const minireft::emulated::Problem problem{h.data(), down.data(), up.data(), bias.data(), out.data(), N, C, r};
  const char* wrong = minireft::emulated::run(problem, nullptr);
  printf("%s, out[0] = %g\n", wrong ? wrong : "done", out[0]);  // 1 + 2 · (0.5 · 1024 + 1) · 8 = 8209
}

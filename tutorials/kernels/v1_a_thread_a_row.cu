// v1: the formula, one thread a row. For each rank a dot product over the row; then every column again.
// Its δ lies in local memory, for an index that the compiler cannot know; the emulator does not count that.
// The cost to see: the 32 lanes of a warp stand on 32 different rows, so one access touches 32 sectors of 32 bytes and uses 4 of each.
// Predicted: about (r + 1) sectors read and one written for every element of h, where 2/8 of a sector would do: 4 (r + 2) times the least.
#include "ladder.h"

namespace minireft::MINIREFT_BACKEND {
namespace {

constexpr int MOST = 64;  // ranks whose δ a thread keeps

__global__ void edit(Problem p) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= p.N) return;
  float delta[MOST];
  for (int j = 0; j < p.r; j++) {
    float sum = load(p.bias + j);
    for (int64_t c = 0; c < p.C; c++) sum = multiply_add(load(p.h + n * p.C + c), load(p.down + j * p.C + c), sum);
    delta[j] = sum;
  }
  for (int64_t c = 0; c < p.C; c++) {
    float x = load(p.h + n * p.C + c);
    for (int j = 0; j < p.r; j++) x = multiply_add(delta[j], load(p.up + j * p.C + c), x);
    store(p.out + n * p.C + c, x);
  }
}

}  // namespace

const char* run(const Problem& p, void* stream) {
  if (p.r > MOST) return "v1 takes ranks up to 64";
  return LAUNCH((edit), dim3(ceil_div(p.N, 64)), 64, 0, stream, p);
}

}  // namespace minireft::MINIREFT_BACKEND

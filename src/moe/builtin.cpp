// The built-in methods, one line each. A list rather than self-registration: a linker drops what
// nobody names. It stands here because this is the topmost layer that has methods.
#include <graft/adapters/adalora.h>
#include <graft/adapters/dora.h>
#include <graft/adapters/dylora.h>
#include <graft/adapters/lora.h>
#include <graft/adapters/lora_fa.h>
#include <graft/adapters/lora_xs.h>
#include <graft/adapters/nlora.h>
#include <graft/adapters/paca.h>
#include <graft/adapters/randlora.h>
#include <graft/adapters/shira.h>
#include <graft/adapters/sora.h>
#include <graft/adapters/vera.h>
#include <graft/moe/adamole.h>
#include <graft/moe/arrow.h>
#include <graft/moe/llava_mole.h>
#include <graft/moe/lora_mixer.h>
#include <graft/moe/loramoe.h>
#include <graft/moe/meteora.h>
#include <graft/moe/mix_lora_recipe.h>
#include <graft/moe/mm_lora.h>
#include <graft/moe/mola.h>
#include <graft/moe/xlora.h>

namespace graft::adapters {

std::vector<MethodEntry> builtin_methods() {
  return {
      lora_entry(),         dora_entry(),
      sora_entry(),         dylora_entry(),
      adalora_entry(),      lora_fa_entry(),
      lora_xs_entry(),      vera_entry(),
      randlora_entry(),     randlora_paper_entry(),
      shira_entry(),        paca_entry(),
      nlora_entry(),        moe::mixlora_entry(),
      moe::mola_entry(),    moe::loramoe_entry(),
      moe::adamole_entry(), moe::llava_mole_entry(),
      moe::arrow_entry(),   moe::xlora_entry(),
      moe::meteora_entry(), moe::lora_mixer_entry(),
      moe::mm_lora_entry(),
  };
}

}  // namespace graft::adapters

//! Constrained decoding: which tokens may come next under a JSON schema, a regular expression or a
//! grammar. The work is llguidance's.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{
    ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::earley::SlicedBiasComputer;
use llguidance::{Matcher, ParserFactory};

use serde_json::Value as Json;

use crate::pieces::SPECIAL;

/// A model's tokens, ready for any number of grammars.
pub struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    /// `pieces`: what each token contributes to the text; `flags`: pieces.rs. `end_ids`, the first
    /// of all, may come where a grammar may end. REQUIRES: ids in [0, vocab).
    pub fn new(
        pieces: &[&[u8]],
        flags: &[u8],
        vocab: usize,
        end_ids: &[u32],
    ) -> Result<Self, String> {
        let mut words: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.to_vec()).collect();
        for (word, flag) in words.iter_mut().zip(flags) {
            if flag & SPECIAL != 0 && !word.is_empty() {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        words.resize(vocab, Vec::new());
        let first = *end_ids.first().ok_or("the model has no end-of-sequence token")?;
        let info = TokRxInfo::new(vocab as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(end_ids);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices)
                .map_err(|e| e.to_string())?;
        factory.quiet();
        Ok(Grammars { factory })
    }

    /// `kind`: "json_schema", "json_object", "regex" or "lark".
    pub fn matcher(&self, kind: &str, text: &str) -> Result<Matcher, String> {
        let grammar = match kind {
            "json_schema" => json_grammar(serde_json::from_str(text).map_err(|e| e.to_string())),
            "json_object" => json_grammar(Ok(serde_json::json!({"type": "object"}))),
            _ => TopLevelGrammar::from_tagged_str(kind, text).map_err(|e| e.to_string()),
        };
        let grammar = grammar.map_err(|e| format!("{kind}: {e}"))?;
        let parser = self.factory.create_parser(grammar).map_err(|e| format!("{kind}: {e}"))?;
        Ok(Matcher::new(Ok(parser)))
    }
}

/// Spaces where Python's json.dumps puts them and nowhere else: with a choice, small models write
/// white space for ever.
fn json_grammar(schema: Result<Json, String>) -> Result<TopLevelGrammar, String> {
    let mut schema = schema?;
    if let Some(members) = schema.as_object_mut() {
        members.entry("x-guidance").or_insert_with(|| {
            serde_json::json!({"whitespace_flexible": false, "item_separator": ", ",
                               "key_separator": ": "})
        });
    }
    Ok(TopLevelGrammar::from_json_schema(schema))
}

/// Fills `allowed`, a bit a token.
pub fn mask(matcher: &mut Matcher, allowed: &mut [u32]) -> Result<(), String> {
    let mask = matcher.compute_mask_or_eos().map_err(|e| e.to_string())?;
    let words = mask.as_slice();
    allowed.fill(0);
    let count = words.len().min(allowed.len());
    allowed[..count].copy_from_slice(&words[..count]);
    Ok(())
}

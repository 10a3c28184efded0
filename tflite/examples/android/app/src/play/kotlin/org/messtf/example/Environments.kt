package org.messtf.example

import android.content.Context
import com.google.ai.edge.litert.Environment
import com.google.android.gms.litert.LiteRt

/** LiteRT as Google Play services bring it. */
object Environments {
    const val HAS_GPU = false // until its initialisation is asked for one

    fun open(context: Context, ready: (Environment) -> Unit, failed: (Exception) -> Unit) {
        LiteRt.initialize(context).addOnSuccessListener { ready(it) }.addOnFailureListener { failed(it) }
    }
}
